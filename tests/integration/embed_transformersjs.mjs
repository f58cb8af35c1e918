// What transformers.js makes of a package, under Node and in a browser alike.
export async function embed(library, request, images, name) {
  const { AutoTokenizer, AutoProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, Tensor, pipeline } =
    library;
  const { texts, pixels, shape } = request;
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const text_model = await CLIPTextModelWithProjection.from_pretrained(name);
  const vision_model = await CLIPVisionModelWithProjection.from_pretrained(name);
  const { text_embeds } = await text_model(tokenizer(texts, { padding: true, truncation: true }));
  const given = await vision_model({ pixel_values: new Tensor("float32", Float32Array.from(pixels), shape) });
  const processor = await AutoProcessor.from_pretrained(name);
  const own = [];
  for (const image of images) {
    const { image_embeds } = await vision_model(await processor(await RawImage.read(image)));
    own.push(image_embeds.tolist()[0]);
  }
  const classify = await pipeline("zero-shot-image-classification", name);
  const scores = await classify(images[0], texts, { hypothesis_template: "{}" });
  return {
    text_embeds: text_embeds.tolist(),
    image_embeds: given.image_embeds.tolist(),
    own_resize: own,
    scores,
  };
}
