// The engine of `d4c-onnx serve`: the server encodes.
async function describe() {
  return answered(await fetch("healthz"));
}

async function zeroShot(pictures, labels, template) {
  const form = new FormData();
  for (const picture of pictures) form.append("images", picture);
  for (const label of labels) form.append("labels", label);
  form.append("templates", template);
  return answered(await fetch("zero-shot", { method: "POST", body: form }));
}

async function answered(response) {
  const said = await response.json().catch(() => ({ error: `the server answers ${response.status}` }));
  if (!response.ok) throw new Error(said.error);
  return said;
}
