// What the page knows: the data beside it, what is measured in them, and where the reader is.

const { texts, passages } = JSON.parse(document.getElementById("data").textContent);
let { lenses } = passages[0]; // of the text that is shown
let tokens = [];
const state = { pinned: 1, hovered: null, start: 1 };
const current = () => state.hovered ?? state.pinned;
const isTrue = (i, text) => i < tokens.length && texts[text] === tokens[i];

// ---- what is measured; token i is predicted at position i − 1 ----------------------------------

const entry = (list, i) => list?.[i - 1] ?? null;
const lateOf = (lens) => lens.readouts.filter((readout) => readout.jsd !== null);

function disagreement(lens, readout, i) {
  if (readout.jsd !== null) return entry(readout.jsd, i);
  const late = readout.ensemble ? lateOf(lens) : [];
  if (!late.length || i < 1) return null;
  return late.reduce((sum, other) => sum + other.jsd[i - 1], 0) / late.length;
}

const QUANTITIES = {
  loss: { name: "loss", unit: " nats", of: (lens, readout, i) => entry(readout.loss, i) },
  entropy: { name: "entropy of the prediction", unit: " nats", of: (lens, readout, i) => entry(readout.entropy, i) },
  jsd: { name: "JS divergence from the ensemble", unit: " nats", of: disagreement },
  depth: { name: "mean depth", unit: " layers", routed: true, of: (lens, _, i) => entry(lens.routing?.depth, i) },
  routing: { name: "routing entropy", unit: " nats", routed: true, of: (lens, _, i) => entry(lens.routing?.entropy, i) },
};
const SHADES = {
  probability: { name: "probability of the guess", show: (share) => `${100 * share} %`, of: (readout, i) => entry(readout.p, i)?.[0] ?? null },
  entropy: { name: "entropy of the prediction", unit: " nats", show: number, of: (readout, i) => entry(readout.entropy, i) },
  rank: { name: "rank of the true token", show: (rank) => rank.toLocaleString("en"), of: (readout, i) => entry(readout.rank, i) },
  kl: { name: "KL to the final layer", unit: " nats", show: number, of: (readout, i) => entry(readout.kl, i) },
};
