// The text as a row of coloured tokens, and what each depth predicts in place of one of them.

const chosen = (select) => {
  const [lens, readout] = select.value.split(":").map(Number);
  return [lenses[lens], lenses[lens].readouts[readout]];
};

function drawTokens() {
  const spans = [...tokens.keys(), tokens.length].map((i) => {
    const isNext = i === tokens.length;
    const span = isNext ? make("span", "token next", "next") : write(make("span", "token"), tokens[i], { dots: false });
    if (i === 0) span.classList.add("unread");
    span.dataset.i = i;
    span.setAttribute("role", "option");
    span.tabIndex = -1;
    return span;
  });
  byId("tokens").replaceChildren(
    ...spans.flatMap((span, i) => (/\n$/.test(tokens[i] ?? "") ? [span, make("br")] : [span])),
  );
}

// What the menus ask for, of one token: the value of one read-out, that of another, the difference.
function asked(i) {
  const quantity = QUANTITIES[byId("quantity").value];
  const own = quantity.of(...chosen(byId("subject")), i);
  const other = byId("baseline").value ? quantity.of(...chosen(byId("baseline")), i) : undefined;
  return { own, other, value: own === null || other === null ? null : own - (other ?? 0) };
}

function colorTokens() {
  const quantity = QUANTITIES[byId("quantity").value];
  const baseline = byId("baseline").value;
  const spans = [...byId("tokens").querySelectorAll(".token")];
  const values = spans.map((_, i) => asked(i).value);
  const known = values.filter((v) => v !== null);
  const show = baseline ? signed : number;
  let scale = null;
  if (baseline) {
    const reach = known.reduce((most, v) => Math.max(most, Math.abs(v)), 0) || 1;
    scale = makeScale(-reach, reach, { signed: true });
  } else if (known.length) {
    const most = known.reduce((a, b) => Math.max(a, b));
    scale = makeScale(quantity === QUANTITIES.depth ? known.reduce((a, b) => Math.min(a, b)) : 0, most);
  }
  byId("tokens-legend").replaceChildren();
  if (known.length) drawLegend(byId("tokens-legend"), scale, show, quantity.unit);
  else byId("tokens-legend").textContent = "not measured here";
  spans.forEach((span, i) => {
    paint(span, scale, values[i]);
    const said = values[i] === null ? "" : `, ${quantity.name} ${show(values[i])}`;
    span.setAttribute("aria-label", `${i < tokens.length ? tokens[i] : "next token"}${said}`);
  });
}

function guessList(readout, i) {
  const list = make("ol", "guesses");
  const shares = readout.p[i - 1];
  readout.top[i - 1].forEach((text, k) => {
    const item = make("li", isTrue(i, text) ? "true" : "");
    const bar = make("i");
    bar.style.width = `${100 * shares[k]}%`;
    item.append(bar, write(make("span", "text"), texts[text]), make("span", "share", percent(shares[k])));
    list.append(item);
  });
  return list;
}

const fate = (readout, i) => {
  const loss = entry(readout.loss, i);
  return loss === null ? "" : `rank ${entry(readout.rank, i).toLocaleString("en")} · loss ${number(loss)}`;
};

function drawDetail() {
  const i = current();
  for (const span of byId("tokens").querySelectorAll(".token")) {
    const isCurrent = Number(span.dataset.i) === i;
    span.classList.toggle("current", isCurrent);
    span.setAttribute("aria-selected", isCurrent);
    span.tabIndex = Number(span.dataset.i) === state.pinned ? 0 : -1;
  }
  const head = make("div", "head");
  const isNext = i === tokens.length;
  const label = isNext ? make("b", "", "next") : write(make("b"), tokens[i]);
  const place = isNext ? "what comes after the text" : `token ${i + 1} of ${tokens.length}`;
  const context = [...tokens.slice(0, i).join("")];
  const before = write(make("span"), context.slice(-80).join(""), { dots: false });
  const opening = context.length > 80 ? ", after “…" : ", after “";
  head.append(label, make("span", "", place));
  if (i) head.lastChild.append(document.createTextNode(opening), before, document.createTextNode("”"));
  const { own, other, value } = asked(i);
  if (value !== null && other !== undefined) {
    const { name, unit } = QUANTITIES[byId("quantity").value];
    head.append(make("span", "difference", `${name} ${number(own)} − ${number(other)} = ${signed(value)}${unit}`));
  }
  byId("detail").replaceChildren(head, ...(i ? lenses.map((lens) => describe(lens, i)) : []));
  if (!i) byId("detail").append(make("p", "note", "Nothing stands before the first token, so it is not predicted."));
}

// The late layers and the ensemble; a model without them is read out at the other's.
function shownReadouts(lens) {
  const late = new Set(lenses.flatMap((other) => lateOf(other).map((readout) => readout.name)));
  const shown = lens.readouts.filter((readout) => readout.ensemble || late.has(readout.name));
  return late.size ? shown : lens.readouts.slice(-6);
}

// Which exit would draft token i, and whether the model would choose the same.
function drafted(drafts, i) {
  const layer = drafts.layers[i - 1];
  if (layer === null) return make("p", "note draft", "No exit is sure: the model goes to the top.");
  const said = make("p", "note draft", `Layer ${layer} drafts “`);
  said.append(write(make("span"), texts[drafts.tokens[i - 1]]), document.createTextNode("”, which the model "));
  said.append(document.createTextNode(drafts.accepted[i - 1] ? "accepts." : "refuses."));
  return said;
}

function describe(lens, i) {
  const box = make("div", "model card");
  const title = make("h3", "", lens.model);
  const grid = make("div", "readouts");
  grid.style.setProperty("--columns", Math.max(...lenses.map((other) => shownReadouts(other).length)));
  if (lens.routing) {
    const [depth, entropy] = [entry(lens.routing.depth, i), entry(lens.routing.entropy, i)];
    title.append(make("span", "", ` · mean depth ${number(depth)}, routing entropy ${number(entropy)}`));
    const shown = new Set(shownReadouts(lens).map((readout) => readout.layer));
    const others = lens.routing.layers
      .map((layer, route) => [layer, lens.routing.weights[i - 1][route]])
      .filter(([layer]) => !shown.has(layer))
      .map(([layer, weight]) => `layer ${layer} ${weight ? percent(weight) : "0 %"}`);
    if (others.length) title.append(make("span", "", ` · weights: ${others.join(", ")}`));
  }
  for (const readout of shownReadouts(lens)) {
    const card = make("div", "readout");
    const route = lens.routing ? lens.routing.layers.indexOf(readout.layer) : -1;
    const weight = route < 0 ? null : lens.routing.weights[i - 1][route];
    const heading = make("h4", "", readout.name);
    const bar = make("div", weight === null ? "weight none" : "weight");
    if (weight !== null) {
      heading.append(make("span", "", `weight ${weight ? percent(weight) : "0 %"}`));
      const fill = make("i");
      fill.style.width = `${100 * weight}%`;
      bar.append(fill);
    }
    card.append(heading, ...(lens.routing ? [bar] : []), guessList(readout, i), make("p", "fate", fate(readout, i)));
    grid.append(card);
  }
  box.append(title, ...(lens.drafts ? [drafted(lens.drafts, i)] : []), grid);
  return box;
}

// ---- what the reader does ----------------------------------------------------------------------

function pin(i, { focus = false } = {}) {
  state.pinned = Math.min(Math.max(i, 0), tokens.length);
  state.hovered = null;
  drawDetail();
  const span = byId("tokens").querySelector(`[data-i="${state.pinned}"]`);
  if (focus) span.focus();
  const isShown = state.pinned >= state.start && state.pinned < state.start + WINDOW;
  if (!isShown && state.pinned > 0) turnTo(state.pinned - (WINDOW >> 1));
}

// The token straight above or below, by where the browser has put them.
function neighbour(span, direction) {
  const from = span.getBoundingClientRect();
  const middle = (from.left + from.right) / 2;
  let best = null;
  for (const other of byId("tokens").querySelectorAll(".token")) {
    const box = other.getBoundingClientRect();
    const rise = direction * (box.top - from.top);
    if (rise < 4) continue;
    const distance = rise * 1000 + Math.abs((box.left + box.right) / 2 - middle);
    if (!best || distance < best.distance) best = { distance, i: Number(other.dataset.i) };
  }
  return best?.i ?? null;
}

const tokenAt = (event) => event.target.closest(".token");
byId("tokens").addEventListener("pointerover", (event) => {
  const span = event.pointerType === "mouse" && tokenAt(event);
  if (!span || Number(span.dataset.i) === current()) return;
  state.hovered = Number(span.dataset.i);
  drawDetail();
});
byId("tokens").addEventListener("pointerleave", () => {
  if (state.hovered === null) return;
  state.hovered = null;
  drawDetail();
});
byId("tokens").addEventListener("click", (event) => {
  const span = tokenAt(event);
  if (span) pin(Number(span.dataset.i), { focus: true });
});
byId("tokens").addEventListener("focusin", (event) => {
  const span = tokenAt(event);
  if (span && Number(span.dataset.i) !== state.pinned) pin(Number(span.dataset.i));
});
byId("tokens").addEventListener("keydown", (event) => {
  const span = tokenAt(event);
  if (!span) return;
  const i = Number(span.dataset.i);
  const goals = {
    ArrowLeft: () => i - 1,
    ArrowRight: () => i + 1,
    ArrowUp: () => neighbour(span, -1),
    ArrowDown: () => neighbour(span, 1),
    Home: () => 0,
    End: () => tokens.length,
  };
  const goal = goals[event.key]?.();
  if (goal === undefined) return;
  event.preventDefault();
  if (goal !== null) pin(goal, { focus: true });
});

for (const id of ["quantity", "subject", "baseline"]) {
  byId(id).addEventListener("change", () => {
    colorTokens();
    drawDetail();
  });
}
