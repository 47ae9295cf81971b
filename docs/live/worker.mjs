// The networks, beside the page so that it stays responsive: onnxruntime-web on one thread, one request at a time.
import * as ort from "./runtime/ort.wasm.min.mjs";
import {randn} from "./noise.mjs";
import {ddim, guided} from "./sampler.mjs";
import {makeTokenizer} from "./tokenizer.mjs";

ort.env.wasm.numThreads = 1;            // more would want headers that a plain server does not send
const opened = {};

/** A folder that `export.py onnx` wrote.  Returns: a promise of {about, tokenize, unet, text_encoder, decoder}. */
function open(folder) {
  opened[folder] ??= (async () => {
    const fetched = async (file, as) => {
      const answer = await fetch(new URL(`models/${folder}/${file}`, import.meta.url));
      if (!answer.ok) throw new Error(`models/${folder}/${file}: ${answer.status}`);
      return answer[as]();
    };
    const [about, vocabulary, merges] = await Promise.all([fetched("model.json", "json"),
      fetched("tokenizer/vocab.json", "json"), fetched("tokenizer/merges.txt", "text")]);
    const model = {about, tokenize: makeTokenizer(vocabulary, merges, about.tokens)};
    for (const name of ["unet", "text_encoder", "decoder"])
      model[name] = await ort.InferenceSession.create(new Uint8Array(await fetched(`${name}.onnx`, "arrayBuffer")));
    return model;
  })();
  return opened[folder];
}

const floats = (values, shape) => new ort.Tensor("float32", values, shape);

/** Pictures of one prompt: {pictures, one Uint8ClampedArray of RGBA each; side, in pixels; seconds; evaluations; cut}. */
async function draw({folder, prompt, seeds, steps, guidance}, onStep) {
  const model = await open(folder), {about} = model, size = about.latents.reduce((a, b) => a * b), n = seeds.length;
  const z = new Float32Array(n * size);
  seeds.forEach((seed, i) => z.set(randn(seed, size), i * size));
  const begin = performance.now();

  /** The network with one text for all pictures. */
  async function withText(ids) {
    const input = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
    const {output} = await model.text_encoder.run({input_ids: input});
    const text = new Float32Array(n * output.data.length);
    for (let i = 0; i < n; i++) text.set(output.data, i * output.data.length);
    const encoder_hidden_states = floats(text, [n, ...output.dims.slice(1)]);
    return async (z, timestep) => (await model.unet.run({z: floats(z, [n, ...about.latents]),
      timestep: floats(new Float32Array(n).fill(timestep), [n]), encoder_hidden_states})).output.data;
  }
  const {ids, cut} = model.tokenize(prompt);
  const network = guided(await withText(ids), guidance === 1 ? null : await withText(model.tokenize("").ids), guidance);
  const latents = await ddim(network, about, z, steps, onStep);
  const {output} = await model.decoder.run({z: floats(latents, [n, ...about.latents])});
  const seconds = (performance.now() - begin) / 1000, side = output.dims[3], area = output.dims[2] * side;
  const pictures = seeds.map((_, n) => {
    const pixels = new Uint8ClampedArray(4 * area).fill(255);
    for (let i = 0; i < area; i++)
      for (let c = 0; c < 3; c++) pixels[4 * i + c] = (output.data[(3 * n + c) * area + i] + 1) * 127.5;
    return pixels;
  });
  return {pictures, side, seconds, evaluations: steps * (guidance === 1 ? 1 : 2), cut};
}

/** {id, open: folder} answers {id, about}; {id, folder, prompt, seeds, steps, guidance} what draw returns, and before it
 *  {id, step} after each step. What fails answers {id, error}. */
onmessage = async ({data}) => {
  const {id} = data;
  try {
    postMessage(data.open ? {id, about: (await open(data.open)).about}
      : {id, ...await draw(data, step => postMessage({id, step}))});
  } catch (error) {
    postMessage({id, error: `${error.message ?? error}`});
  }
};
