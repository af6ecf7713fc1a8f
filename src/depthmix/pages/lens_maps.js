// Layers by tokens: the guess of each layer in place of each token, as a heat map.

const WINDOW = 48; // columns at a time

function drawMaps() {
  const shade = SHADES[byId("shade").value];
  const end = Math.min(state.start + WINDOW - 1, tokens.length);
  const columns = Array.from({ length: end - state.start + 1 }, (_, k) => state.start + k);
  const all = lenses.flatMap((lens) =>
    lens.readouts.flatMap((readout) => columns.map((i) => shade.of(readout, i)).filter((v) => v !== null)),
  );
  const most = all.reduce((a, b) => Math.max(a, b), 0);
  const isRank = shade === SHADES.rank;
  const low = isRank ? 1 : 0;
  const high = shade === SHADES.probability ? 1 : most || low + 1;
  const scale = makeScale(low, high, { logarithmic: isRank });
  drawLegend(byId("maps-legend"), scale, shade.show, shade.unit);
  byId("pager").hidden = tokens.length <= WINDOW;
  byId("range").textContent = `tokens ${state.start + 1} to ${Math.min(end + 1, tokens.length)} of ${tokens.length}`;
  byId("earlier").disabled = state.start === 1;
  byId("later").disabled = end === tokens.length;
  byId("maps").replaceChildren(...lenses.map((lens, l) => drawMap(lens, l, columns, shade, scale)));
  for (const box of document.querySelectorAll(".scroll")) box.addEventListener("scroll", scrollTogether);
}

function drawMap(lens, l, columns, shade, scale) {
  const figure = make("div", "map card");
  const scroll = make("div", "scroll");
  const table = make("table");
  table.setAttribute("role", "grid");
  table.setAttribute("aria-label", `Guesses of ${lens.model} by layer and token`);
  const header = make("tr");
  header.append(make("th", "", "layer"));
  for (const i of columns) {
    const cell = i < tokens.length ? write(make("th"), tokens[i]) : make("th", "", "next");
    cell.scope = "col";
    cell.dataset.i = i;
    header.append(cell);
  }
  const body = make("tbody");
  [...lens.readouts.keys()].reverse().forEach((r, row) => {
    const readout = lens.readouts[r];
    const line = make("tr", readout.ensemble || readout.jsd !== null ? "late" : "");
    const name = make("th", "", readout.layer === null ? readout.name : `${readout.layer}`);
    name.scope = "row";
    line.append(name);
    for (const i of columns) {
      const text = readout.top[i - 1][0];
      const cell = write(make("td", isTrue(i, text) ? "true" : ""), texts[text]);
      cell.tabIndex = row === 0 && i === columns[0] ? 0 : -1;
      Object.assign(cell.dataset, { lens: l, readout: r, i });
      paint(cell, scale, shade.of(readout, i));
      line.append(cell);
    }
    body.append(line);
  });
  table.append(make("thead"), body);
  table.tHead.append(header);
  scroll.append(table);
  if (lenses.length > 1) figure.append(make("h3", "", lens.model));
  figure.append(scroll);
  return figure;
}

function scrollTogether({ target }) {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box !== target) [box.scrollLeft, box.scrollTop] = [target.scrollLeft, target.scrollTop];
  }
}

// Scrolls sideways until a token's column is there, with two before it.
function showColumn(box, i) {
  const head = box.querySelector(`thead th[data-i="${Math.max(i - 2, state.start)}"]`);
  const layers = box.querySelector("thead th");
  if (head) box.scrollLeft = head.offsetLeft - layers.offsetWidth;
}

function describeCell(cell) {
  const [l, r, i] = [cell.dataset.lens, cell.dataset.readout, Number(cell.dataset.i)];
  const readout = lenses[l].readouts[r];
  const where = make("span", "where", `${lenses.length > 1 ? `${lenses[l].model}, ` : ""}${readout.name}, `);
  const token = i < tokens.length ? write(make("b"), tokens[i]) : make("b", "", "next");
  where.append(document.createTextNode("in place of "), token);
  const measures = [`entropy ${number(readout.entropy[i - 1])}`, `KL to the final layer ${number(readout.kl[i - 1])}`];
  const told = [fate(readout, i), ...measures].filter(Boolean).join(" · ");
  byId("cell").replaceChildren(where, guessList(readout, i), make("span", "where", told));
  for (const head of byId("maps").querySelectorAll("thead th[data-i]")) {
    head.classList.toggle("current", Number(head.dataset.i) === i);
  }
}

// ---- what the reader does ----------------------------------------------------------------------

function turnTo(start) {
  state.start = Math.max(1, Math.min(start, tokens.length - WINDOW + 1));
  drawMaps();
}

const cellAt = (event) => event.target.closest("td");
for (const kind of ["pointerover", "focusin", "click"]) {
  byId("maps").addEventListener(kind, (event) => cellAt(event) && describeCell(cellAt(event)));
}
byId("maps").addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const cell = cellAt(event);
  const step = steps[event.key];
  if (!cell || !step) return;
  event.preventDefault();
  const rows = cell.closest("tbody").rows;
  const row = rows[cell.parentElement.sectionRowIndex + step[0]];
  const goal = row?.cells[cell.cellIndex + step[1]];
  if (!goal || goal.tagName !== "TD") return;
  cell.tabIndex = -1;
  goal.tabIndex = 0;
  goal.focus();
});

byId("earlier").addEventListener("click", () => turnTo(state.start - WINDOW));
byId("later").addEventListener("click", () => turnTo(state.start + WINDOW));
byId("shade").addEventListener("change", drawMaps);
