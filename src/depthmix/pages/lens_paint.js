// Colours and words of the lens page. Texts of models reach the page by `textContent` alone.
"use strict";

const byId = (id) => document.getElementById(id);

// ---- colours: from the page's own to its ink, so that lightness alone says the same ------------

const LIGHT = ["#fbfaf4", "#e6f0c8", "#b5dcbd", "#74c0be", "#3f9cbb", "#2a6dab", "#213f88"];
const DARK = ["#1d232d", "#214063", "#2a6288", "#3d8a97", "#6bb398", "#b1d58e", "#f5eca0"];
const SIGNED = ["#1d3f86", "#5a76ae", "#9fabc4", "#c4c4be", "#dccf8f", "#f0de76", "#fff3a8"];
const night = matchMedia("(prefers-color-scheme: dark)");

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function blend(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const lower = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [channels(stops[lower]), channels(stops[lower + 1])];
  return from.map((channel, k) => channel + (place - lower) * (to[k] - channel));
}

function paint(element, scale, value) {
  if (value === null) {
    element.style.background = element.style.color = "";
    return;
  }
  const color = blend(scale.stops, scale.share(value));
  const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  element.style.background = `rgb(${color.map(Math.round).join(" ")})`;
  element.style.color = luminance > 0.179 ? "#000000" : "#ffffff"; // whichever has more contrast
}

function makeScale(low, high, { signed = false, logarithmic = false } = {}) {
  const at = logarithmic ? Math.log : (value) => value;
  const span = at(high) - at(low) || 1;
  const stops = signed ? SIGNED : night.matches ? DARK : LIGHT;
  return { low, high, stops, share: (value) => (at(value) - at(low)) / span };
}

function drawLegend(box, scale, show, unit = "") {
  const bar = make("i");
  const colors = [0, 1, 2, 3, 4, 5, 6].map((k) => `rgb(${blend(scale.stops, k / 6).map(Math.round).join(" ")})`);
  bar.style.background = `linear-gradient(to right, ${colors.join(", ")})`;
  box.replaceChildren(make("span", "", show(scale.low)), bar, make("span", "", show(scale.high) + unit));
}

// ---- words -------------------------------------------------------------------------------------

function make(name, className = "", text = "") {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text;
  return element;
}

const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;
const MARKS = { "\n": "↵", "\t": "⇥" };
const PARTS = /(?:\\x[0-9a-f]{2})+|./gsu; // parts of a character that other tokens complete, as `\xf0`

// Write a token so that nothing of it is hidden or moves its neighbours.
function write(element, text, { dots = true } = {}) {
  element.textContent = "";
  let run = /^\p{M}/u.test(text) ? "◌" : "";
  const flush = () => {
    if (run) element.append(document.createTextNode(run));
    run = "";
  };
  for (const [character] of text.matchAll(PARTS)) {
    if (character === " " && dots) {
      flush();
      element.append(make("span", "space", "·"));
    } else if (character.startsWith("\\x") && character.length > 2) {
      flush();
      element.append(make("span", "code", character.replaceAll("\\x", " ").trim().toUpperCase()));
    } else if (UNSEEN.test(character)) {
      flush();
      const number = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      const mark = MARKS[character];
      element.append(make("span", mark ? "space" : "code", mark ?? `U+${number}`));
    } else {
      run += character;
    }
  }
  flush();
  return element;
}

const number = (value, digits = 2) => value.toFixed(digits).replace(/^-0\.?0*$/, "0").replace("-", "−");
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + number(value, digits);
const percent = (share) =>
  share < 0.001 ? "<0.1 %" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
