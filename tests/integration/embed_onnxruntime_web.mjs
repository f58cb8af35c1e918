// What onnxruntime-web makes of a package's two files, under Node and in a browser alike.
export async function embed(ort, image_encoder, text_encoder, { pixels, shape, input_ids }) {
  const options = { executionProviders: ["wasm"], logSeverityLevel: 4 };
  const image = await ort.InferenceSession.create(image_encoder, options);
  const given = new ort.Tensor("float32", Float32Array.from(pixels), shape);
  const { image_embeds } = await image.run({ pixel_values: given });
  const text = await ort.InferenceSession.create(text_encoder, options);
  const texts = [];
  for (const ids of input_ids) {
    const feed = new ort.Tensor("int64", BigInt64Array.from(ids.map(BigInt)), [1, ids.length]);
    texts.push(Array.from((await text.run({ input_ids: feed })).text_embeds.data));
  }
  const [rows, size] = image_embeds.dims;
  const images = Array.from({ length: rows }, (_, row) => Array.from(image_embeds.data.slice(row * size, (row + 1) * size)));
  return { image_embeds: images, text_embeds: texts };
}
