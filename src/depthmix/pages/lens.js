// Puts the lens page together, once what it draws with is there.

function fillMenus() {
  passages.forEach(({ title }, p) => {
    const option = make("option", "", title);
    option.value = p;
    byId("passage").append(option);
  });
  byId("passage").parentElement.hidden = passages.length < 2;
  const routed = lenses.some((lens) => lens.routing);
  for (const [key, { name, routed: needsRouter }] of Object.entries(QUANTITIES)) {
    const option = make("option", "", name);
    option.value = key;
    option.disabled = !routed && (needsRouter || key === "jsd");
    byId("quantity").append(option);
  }
  for (const [key, { name }] of Object.entries(SHADES)) {
    const option = make("option", "", name);
    option.value = key;
    byId("shade").append(option);
  }
  const nothing = make("option", "", "nothing");
  nothing.value = "";
  byId("baseline").append(nothing);
  for (const select of [byId("subject"), byId("baseline")]) {
    lenses.forEach((lens, l) => {
      const group = make("optgroup");
      group.label = lens.model;
      [...lens.readouts.keys()].reverse().forEach((r) => {
        const { name } = lens.readouts[r];
        const option = make("option", "", lenses.length > 1 ? `${name} · ${lens.model}` : name);
        option.value = `${l}:${r}`;
        group.append(option);
      });
      select.append(group);
    });
  }
  byId("subject").value = `0:${lenses[0].readouts.length - 1}`;
}

night.addEventListener("change", () => {
  colorTokens();
  drawMaps();
});

function show(passage) {
  ({ lenses } = passages[passage]);
  tokens = lenses[0].tokens.map((index) => texts[index]);
  let opening = Math.min(passages[passage].opening, tokens.length);
  while (opening > 1 && opening < tokens.length && !tokens[opening].trim()) opening += 1;  // not on white space
  Object.assign(state, { pinned: opening, hovered: null, start: 1 });
  drawTokens();
  colorTokens();
  drawMaps();
  pin(opening);
  describeCell(byId("maps").querySelector(`td[data-i="${opening}"]`));
  for (const box of document.querySelectorAll(".scroll")) showColumn(box, opening);
}

byId("passage").addEventListener("change", (event) => show(event.target.value));
fillMenus();
show(0);
