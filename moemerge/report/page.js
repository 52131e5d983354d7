"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const { texts, experts, layers: L, experts_per_token: K, summary } = report;
const E = experts.length;
const EVERY = -1; // the slider's first stop: all layers together
const PALETTE = [ // no two are alike to colour-blind eyes: tests/test_page.py measures it
  "#5cb3f0", "#d6842c", "#f7d64a", "#44909f", "#a5f3ea", "#f0ab8a", "#a678e6", "#c3e6b0",
];
let layer = EVERY;
const painters = []; // what each section does when the layer changes

const $ = (id) => document.getElementById(id);
const known = (value) => value !== null && value !== undefined;
const range = (n) => Array.from({ length: n }, (_, i) => i);
const percent = (share) => `${Math.round(100 * share)}%`;
const argmax = (row) => row.indexOf(Math.max(...row)); // the lowest index on ties
const sum = (values) => values.reduce((total, value) => total + value, 0);
const mean = (rows) => rows[0].map((_, e) => sum(rows.map((row) => row[e])) / rows.length);
const at = (table, l) => (l === EVERY ? mean(table) : table[l]); // one row (E) of a text's (L, E)
const where = (l) => (l === EVERY ? "all layers" : `layer ${l}`);

// An element with its attributes and children; text is only ever text.
function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (known(value)) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter(known));
  return node;
}

function measure(node, value, property = "--v") {
  node.style.setProperty(property, value);
  return node;
}

const name = (e) => h("bdi", { "data-e": e, class: "swatch", title: experts[e] }, experts[e]);
const named = (text) => h("bdi", {}, text.name);
const listed = (nodes) => nodes.flatMap((node, i) => (i ? [", ", node] : [node]));

function colours() {
  const made = (e) => `oklch(${[0.75, 0.88, 0.66][e % 3]} 0.1 ${(e * 137.5) % 360})`;
  for (const e of range(E)) {
    document.styleSheets[0].insertRule(`[data-e="${e}"] { --c: ${PALETTE[e] ?? made(e)} }`);
  }
}

// Black or white, whichever reads better on what the cell's colour has become.
const dot = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function ink(cell) {
  dot.fillStyle = getComputedStyle(cell).backgroundColor;
  dot.fillRect(0, 0, 1, 1);
  const [r, g, b] = Array.from(dot.getImageData(0, 0, 1, 1).data, (byte) => (byte / 255) ** 2.2);
  cell.style.color = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

function header() {
  document.title = `${report.model}: routing`;
  $("model").textContent = report.model;
  const judged = report.held_out
    ? "on the config's own prompts, each by routers fitted without it"
    : "on given texts";
  $("about").textContent = `${E} experts, ${K} a token, ${L} layers. Judged ${judged}.`;
  $("verdicts").append(...(report.verdicts ?? []).map((line) => h("li", { dir: "auto" }, line)));
  $("legend").append(...range(E).map((e) => h("li", {}, name(e))));
}

function ranges(numbers) { // 0, 1, 2, 5 -> 0–2, 5
  const runs = [];
  for (const n of numbers) {
    if (runs.length && runs.at(-1)[1] === n - 1) runs.at(-1)[1] = n;
    else runs.push([n, n]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
}

function numbers() {
  const { t1, t2, entropy, idle, collisions, blind_layers: blind } = summary;
  const tile = (value, label, shown, ...note) => {
    if (!known(value)) return;
    const parts = [h("dt", {}, label), h("dd", { class: "value" }, shown), h("dd", {}, ...note)];
    $("numbers").append(h("div", {}, parts));
  };
  tile(t1, "own expert first", percent(t1), `chance is ${percent(1 / E)}`);
  tile(t2, "own in first two", percent(t2), `chance is ${percent(Math.min(1, 2 / E))}`);
  tile(entropy, "evenness of load", entropy?.toFixed(2), "entropy; 1 is even");
  tile(idle, "idle experts", idle?.length, idle?.length ? listed(idle.map(name)) : "all are used");
  tile(collisions, "colliding pairs", collisions?.length,
    collisions?.length ? "named below, with their texts" : "no two are mixed up");
  tile(blind, "blind layers", blind?.length,
    blind?.length ? `cannot tell experts apart: ${ranges(blind)}` : "all tell experts apart");
  $("collisions").append(...(collisions ?? []).map(({ experts: [a, b], share, texts: quotes }) =>
    h("li", {}, `${percent(share)} of `, name(a), "'s tokens go to ", name(b), " first",
      (quotes ?? []).map((text) => h("blockquote", { dir: "auto" }, text)))));
}

function table(node, head, rows) {
  const row = ([first, ...cells]) => h("tr", {}, h("th", { scope: "row" }, first), cells);
  node.append(
    h("thead", {}, h("tr", {}, h("td"), head.map((cell) => h("th", { scope: "col" }, cell)))),
    h("tbody", {}, rows.map(row)),
  );
}

function perplexities() {
  const judged = texts.filter((text) => text.perplexity);
  const columns = [
    ["MoE", (p) => p.moe],
    ["base", (p) => p.base],
    ["average", (p) => p.average],
    ...experts.map((expert, e) => [name(e), (p) => p.experts?.[expert]]),
  ].filter(([, get]) => judged.some((text) => known(get(text.perplexity))));
  table($("perplexities"), columns.map(([label]) => label), judged.map((text) => {
    const values = columns.map(([, get]) => get(text.perplexity));
    const best = Math.min(...values.filter(known));
    return [named(text), ...values.map((value) =>
      h("td", { class: value === best ? "best" : null }, known(value) ? value.toFixed(2) : ""))];
  }));
  const costs = Object.entries(report.by_experts_per_token ?? {});
  const now = report.by_experts_per_token?.[K];
  const against = (value) => `${value < now ? "" : "+"}${(100 * (value / now - 1)).toFixed(1)}%`;
  table($("costs"), ["all texts", known(now) ? `against ${K}` : ""], costs.map(([k, value]) => [
    k,
    h("td", { class: +k === K ? "best" : null }, value.toFixed(2)),
    h("td", {}, known(now) ? (+k === K ? "as it is" : against(value)) : ""),
  ]));
  $("judged").hidden = !judged.length;
  $("cost").hidden = !costs.length;
  $("perplexity").hidden = !judged.length && !costs.length;
}

function slider() {
  const input = $("layer"), root = document.documentElement;
  input.max = L;
  measure(root, L + 1, "--stops");
  measure(root, L, "--layers");
  measure(root, E, "--experts");
  const blind = new Set(summary.blind_layers ?? []);
  const rate = (l) => (l === EVERY ? summary.t1 : summary.layer_t1?.[l]);
  for (const l of [EVERY, ...range(L)]) {
    $("strip").append(measure(h("i", { class: blind.has(l) ? "blind" : null }), rate(l) ?? 0.3));
  }
  input.addEventListener("input", () => choose(+input.value - 1));
  painters.push(() => {
    const own = known(rate(layer)) ? `own expert first: ${percent(rate(layer))}` : null;
    input.value = layer + 1;
    input.setAttribute("aria-valuetext", where(layer));
    $("which").textContent = layer === EVERY ? "All layers" : `Layer ${layer} of 0–${L - 1}`;
    $("said").textContent = [own, blind.has(layer) ? "blind" : null].filter(known).join("; ");
    measure(root, layer, "--layer").classList.toggle("every", layer === EVERY);
  });
}

function choose(l) {
  layer = l;
  for (const paint of painters) paint();
}

// What the cell of a text and an expert says in full.
const detail = (text, e, l) => () => {
  const line = (label, rows) => rows && h("div", {}, `${label}: ${percent(at(rows, l)[e])}`);
  return [
    h("div", {}, named(text), " to ", name(e), `, ${where(l)}`),
    line("tokens that find it first", text.first),
    line("its share of the load", text.load),
    line("its mean weight", text.weight),
  ];
};

function matrix() {
  const cells = texts.map((text) => range(E).map((e) =>
    h("td", { "data-e": e, class: text.expert === e ? "fill own" : "fill" })));
  table($("matrix"), range(E).map(name), texts.map((text, t) =>
    [[named(text), h("div", { class: "muted" }, `${text.tokens} tokens`)], ...cells[t]]));
  painters.push(() => texts.forEach((text, t) => at(text.first, layer).forEach((share, e) => {
    measure(cells[t][e], share).textContent = percent(share);
    ink(cells[t][e]);
    explain(cells[t][e], detail(text, e, layer));
  })));
}

// Bars of [expert, share]; `scale` is the share that fills a track.
function bars(shares, scale, chosen = []) {
  return shares.map(([e, share]) =>
    h("li", { "data-e": e, class: chosen.includes(e) ? "chosen" : null }, name(e),
      h("span", { class: "track" }, measure(h("span", { class: "bar" }), share / scale, "--w")),
      h("span", { class: "share" }, percent(share))));
}

function load() {
  const loads = range(L).map((l) => mean(texts.map((text) => text.load[l])));
  const scale = Math.max(...loads.flat(), ...summary.load);
  measure($("load"), 1 / E / scale, "--even");
  painters.push(() => {
    const shares = layer === EVERY ? summary.load : loads[layer];
    $("load").replaceChildren(...bars([...shares.entries()], scale));
  });
}

function heat() {
  const cell = (text, e, l) => {
    const share = text.first[l][e];
    const node = h("td", { class: "fill", "data-e": e, "data-l": l }, percent(share));
    return explain(measure(node, share), detail(text, e, l));
  };
  const rows = (text) => range(E).map((e) =>
    h("tr", { class: text.expert === e ? "own" : null }, h("th", { scope: "row" }, name(e)),
      range(L).map((l) => cell(text, e, l))));
  $("heat").append(...texts.map((text) => {
    const label = `${text.name}: share of tokens by first expert (rows) and layer (columns)`;
    return h("div", { class: "heat" },
      h("h3", { dir: "auto" }, text.name),
      h("div", { class: "cells" }, h("table", { "aria-label": label }, h("tbody", {}, rows(text)))),
      h("div", { class: "axis", "aria-hidden": true },
        h("span", {}, "layer 0"), h("span", {}, L - 1)));
  }));
  $("heat").addEventListener("click", ({ target: { dataset } }) => dataset.l && choose(+dataset.l));
}

// A passage is decoded when it first comes into view, and coloured while it is in view.
function passages() {
  const inView = new Set();
  const watch = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) {
      inView[isIntersecting ? "add" : "delete"](target);
      if (isIntersecting) target.paint();
    }
  }, { rootMargin: "50%" });
  const figures = (report.passages ?? []).map(figure);
  $("passages").append(...figures);
  figures.forEach((node) => watch.observe(node));
  painters.push(() => inView.forEach((node) => node.paint()));
  addEventListener("beforeprint", () => figures.forEach((node) => node.paint()));
  $("reading").hidden = !figures.length;
}

function figure({ text: t, tokens, weights }, index) {
  const text = texts[t], T = tokens.length, caption = h("span");
  const body = h("div", {
    class: "passage", dir: "auto", "data-e": text.expert,
    role: "listbox", "aria-label": `${text.name}, passage ${index + 1}`,
  }, tokens.join(""));
  const node = h("figure", {}, h("figcaption", {}, h("b", {}, named(text)), caption), body);
  let spans, row, often; // elements (T); (l, i) -> E bytes; in how many layers each is first (T, E)

  const open = () => {
    const bytes = Uint8Array.from(atob(weights), (c) => c.charCodeAt(0)); // (L, T, E)
    row = (l, i) => Array.from(bytes.subarray((l * T + i) * E, (l * T + i + 1) * E));
    often = tokens.map((_, i) => {
      const counts = Array(E).fill(0);
      for (const l of range(L)) counts[argmax(row(l, i))]++;
      return counts;
    });
    spans = tokens.map((token, i) => explain(h("span", {
      role: "option", tabindex: i ? -1 : 0, class: token.includes("\n") ? "newline" : null,
    }, token), () => weighed(i)));
    body.replaceChildren(...spans);
  };

  const weighed = (i) => {
    const every = layer === EVERY, e = argmax(often[i]);
    const shares = every ? mean(range(L).map((l) => row(l, i))) : row(layer, i);
    const ranked = [...shares.map((byte) => byte / 255).entries()].sort((a, b) => b[1] - a[1]);
    const chosen = every ? [] : ranked.slice(0, K).map(([one]) => one);
    return [
      h("code", {}, JSON.stringify(tokens[i]).slice(0, 80)),
      h("div", {}, where(layer), ...(every ? [": first is ", name(e), ` in ${often[i][e]}`] : [])),
      h("ul", { class: "bars" }, bars(ranked.slice(0, 12), 1, chosen)),
    ];
  };

  body.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -T, End: T }[event.key];
    if (!step) return;
    event.preventDefault();
    spans[Math.max(0, Math.min(T - 1, spans.indexOf(event.target) + step))].focus();
  });
  body.addEventListener("focusin", ({ target }) =>
    spans.forEach((span) => (span.tabIndex = span === target ? 0 : -1)));

  node.paint = () => {
    if (!spans) open();
    const first = range(T).map((i) => argmax(layer === EVERY ? often[i] : row(layer, i)));
    first.forEach((e, i) => (spans[i].dataset.e = e));
    const own = first.filter((e) => e === text.expert).length;
    caption.textContent = known(text.expert) ? `: own expert first on ${own} of ${T} tokens` : "";
  };
  return node;
}

// One tip for whatever has more to say, on hover, focus and tap.
const tips = new WeakMap();
let tipped = null;

function explain(node, what) {
  tips.set(node, what);
  node.setAttribute("data-tip", "");
  return node;
}

function tell(node) {
  const tip = $("tip");
  tipped = node;
  tip.hidden = !node;
  if (!node) return;
  tip.replaceChildren(...tips.get(node)().filter(known));
  const box = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - width - 8);
  const top = box.bottom + 8 + height < innerHeight ? box.bottom + 8 : box.top - height - 8;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, top)}px`;
}

function tipping() {
  for (const kind of ["pointerover", "focusin"]) {
    document.addEventListener(kind, ({ target }) => tell(target.closest?.("[data-tip]") ?? null));
  }
  document.addEventListener("keydown", ({ key }) => key === "Escape" && tell(null));
  document.addEventListener("scroll", () => tipped && tell(tipped), { passive: true });
  painters.push(() => tipped && tell(tipped));
}

for (const build of [
  colours, header, numbers, perplexities, slider, matrix, load, heat, passages, tipping,
]) build();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => choose(layer));
choose(EVERY);
