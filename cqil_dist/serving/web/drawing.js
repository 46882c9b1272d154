// The drawing of the state in page.js: plans, timelines, numbers, and what is pointed at.
"use strict";

// ---- Plans and timelines.

$("#kind-legend").append(...KINDS.map((kind) =>
  make("span", { className: "key" }, make("i", { className: "swatch", dataset: { kind } }), kind)));

function describeGroup(side, index) {
  const group = side.groups[index];
  if (!group) return "vocabulary head";
  if (group.layers.length === 1) return `group ${index}: layer ${group.layers[0]}`;
  const sees = group.bypass === 0 ? "no bypass" : `bypass ${group.bypass}`;
  return `group ${index}: layers ${group.layers.join(" ∥ ")}, ${sees}`;
}

function drawPlan(side) {
  const columns = side.model.plan.num_layers;
  const plan = make("div", { className: "plan", dataset: { side: side.name } });
  plan.classList.toggle("dense", columns > DENSE);
  side.groups.forEach((group, index) => {
    const concurrent = group.layers.length > 1;
    const cell = make("div", { className: "group", dataset: { side: side.name, group: index } });
    cell.classList.toggle("concurrent", concurrent);
    cell.style.flex = `0 0 ${100 / columns}%`;
    for (const layer of group.layers) {
      cell.append(make("div", { className: "layer", textContent: layer }));
    }
    if (concurrent) {
      cell.append(make("div", { className: "bypass", textContent: `D${group.bypass}` }));
    }
    plan.append(cell);
  });
  return plan;
}

function describePlan(side) {
  const concurrent = side.groups.filter((group) => group.layers.length > 1).length;
  const groups = plural(side.groups.length, "group");
  return concurrent ? `${groups}, ${concurrent} concurrent` : groups;
}

function drawTraces() {
  const line = (textContent) => make("span", { textContent });
  const traces = page.sides.map((side) => {
    const label = make("div", { className: "rank" });
    label.append(make("b", { textContent: side.title }), line(describePlan(side)));
    const step = make("div", { className: "summary step" });
    const rows = [make("div", { className: "row top" }, label, drawPlan(side), step)];
    page.ranks.forEach((rank, index) => {
      const before = page.ranks[index - 1];
      const name = make("div", { className: "rank" });
      name.append(make("b", { textContent: `rank ${rank.rank}` }),
        line(`${rank.address} ${rank.device} ${bytes(rank.weight_bytes)}`));
      name.dataset.tip =
        `rank ${rank.rank}\nnode ${rank.node_id}\naddress ${rank.address}\nprocess ${rank.pid}\n` +
        `device ${rank.device}\nweights ${bytes(rank.weight_bytes)}, of all plans together`;
      const track = makeSvg("svg", { class: "track", role: "img" });
      track.setAttribute("aria-label", `spans of rank ${rank.rank}, ${side.title}`);
      track.append(makeSvg("g", { class: "ticks" }), makeSvg("g", { class: "spans" }));
      const row = make("div", { className: "row", dataset: { side: side.name, rank: rank.rank } });
      row.append(name, track, make("div", { className: "summary" }));
      row.classList.toggle("node", Boolean(before) && before.node_id !== rank.node_id);
      rows.push(row);
    });
    return make("div", { className: "trace", dataset: { side: side.name } }, ...rows);
  });
  const axis = make("div", { className: "row" }, make("div"), makeSvg("svg", { class: "axis" }));
  $("#traces").replaceChildren(...traces, axis);
}

/** The places of four to nine ticks between 0 and `end`, 0 among them. */
function ticks(end) {
  const rough = end / 8;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough));
  return Array.from({ length: Math.floor(end / step) + 1 }, (_, index) => index * step);
}

/** `count` children of `parent` with this tag; those that are there are used first. */
function pooled(parent, tag, count) {
  const found = [...parent.querySelectorAll(tag)];
  while (found.length > count) found.pop().remove();
  while (found.length < count) found.push(parent.appendChild(makeSvg(tag)));
  return found;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}

function paintTraces() {
  const end_us = 1000 * Math.max(0, ...page.sides.map((side) => side.shown?.duration_ms ?? 0));
  const percent = (us) => `${((100 * us) / end_us).toFixed(4)}%`;
  const places = end_us ? ticks(end_us / 1000) : [];
  pooled($(".axis"), "text", places.length).forEach((text, index) => {
    const anchor = index ? "middle" : "start";
    set(text, { x: percent(1000 * places[index]), y: 12, "text-anchor": anchor });
    text.textContent = `${Number(places[index].toPrecision(6))}${index ? "" : " ms"}`;
  });
  for (const side of page.sides) paintTrace(side, side.shown, places, percent);
  $("#timeline-title").textContent =
    !end_us ? "The plan over the ranks"
    : selected === null ? "Where the last token’s time went"
    : `Where the time of token ${selected + 1} went`;
  $("#latest").hidden = selected === null;
}

function paintTrace(side, timeline, places, percent) {
  const trace = $(`.trace[data-side="${side.name}"]`);
  $(".step", trace).replaceChildren(...(timeline ? describeStep(timeline) : []));
  for (const row of trace.querySelectorAll(".row[data-rank]")) {
    const found = timeline?.ranks.find((rank) => rank.rank === Number(row.dataset.rank));
    const spans = found?.spans ?? [];
    pooled($(".spans", row), "rect", spans.length).forEach((rect, index) => {
      const { kind, group, start_us, end_us } = spans[index];
      const width = percent(end_us - start_us);
      set(rect, { x: percent(start_us), width, y: 3, height: 24 });
      set(rect, { "data-side": side.name, "data-kind": kind, "data-group": group });
      rect.span = spans[index];
    });
    pooled($(".ticks", row), "line", timeline ? places.length + 1 : 0).forEach((line, index) => {
      const isEnd = index === places.length;
      const x = percent(1000 * (isEnd ? timeline.duration_ms : places[index]));
      set(line, { x1: x, x2: x, y1: 0, y2: 30, class: isEnd ? "end" : "" });
    });
    paintSummary($(".summary", row), spans);
  }
}

function paintSummary(place, spans) {
  const total = (wanted) => spans.reduce((sum, span) =>
    sum + (span.kind.endsWith("exchange") === wanted ? span.end_us - span.start_us : 0), 0);
  const lines = [told("compute", total(false)), told("exchange, wait", total(true))];
  place.replaceChildren(...(spans.length ? lines : []));
}

function told(name, us) {
  return make("span", {}, `${name} `, make("b", { textContent: `${whole.format(us)} µs` }));
}

function describeStep(timeline) {
  const lines = [told(`step ${timeline.step}`, 1000 * timeline.duration_ms)];
  if (timeline.step_tokens > 1) lines.push(make("span", {}, `of ${timeline.step_tokens} tokens`));
  return lines;
}

function light() {
  for (const element of document.querySelectorAll(".group, .track rect")) {
    const { side, group } = element.dataset;
    element.classList.toggle("here", side === lit?.side && Number(group) === lit.group);
  }
  for (const trace of document.querySelectorAll(".trace")) {
    trace.classList.toggle("lit", trace.dataset.side === lit?.side);
  }
}

// ---- Numbers.

let painting = 0;

function paintSoon() {
  painting ||= setTimeout(paint, PAINT_EVERY_MS);
}

function paint() {
  clearTimeout(painting);
  painting = 0;
  if (!page.sides.length) return;
  const medians = page.sides.map((side) => side.durations.length ? median(side.durations) : 0);
  // One scale for both sides. A step that takes unusually long is cut off, to not flatten the rest.
  const top = 1.7 * Math.max(...medians);
  page.sides.forEach((side, index) => paintMeters(side, medians[index], top));
  if (page.sides.length === 2) paintComparison(medians);
  paintTraces();
  light();
}

function paintMeters(side, middle, top) {
  const latest = side.durations.at(-1);
  side.find(".median").textContent = middle ? milliseconds(middle) : "–";
  side.find(".latest").textContent = latest === undefined ? "–" : milliseconds(latest);
  const points = side.durations.slice(1 - page.steps).map((duration, index) => {
    const height = 100 - (100 * Math.min(duration, top)) / top;
    return `${((100 * index) / Math.max(page.steps - 2, 1)).toFixed(1)},${height.toFixed(1)}`;
  });
  side.find(".spark polyline").setAttribute("points", points.join(" "));
}

function paintComparison(medians) {
  const [left, right] = page.sides.map((side) => side.tokens);
  const both = Math.min(left.length, right.length);
  let agreeing = 0;
  let first = 0;
  for (let index = 0; index < both; index++) {
    if (left[index].id === right[index].id) agreeing++;
    else first ||= index + 1;
  }
  const difference = first ? `first difference at token ${first}` : "no difference";
  $("#agreement").textContent =
    both ? `${agreeing} of ${plural(both, "token")} agree, ${difference}` : "no tokens yet";
  const ended = !page.running && medians[0] && medians[1];
  $("#verdict").textContent = ended ? `concurrent is ${faster(...medians)} per step` : "";
  const [before, after] = page.sides.map((side) => side.groups.length);
  $("#verdict").title =
    `Medians: ${milliseconds(medians[1])} ms in place of ${milliseconds(medians[0])} ms. ` +
    `Its depth, ${after} in place of ${before}, would alone make it ${faster(before, after)}.`;
}

function faster(before, after) {
  const percent = 100 * (1 - after / before);
  const size = Math.abs(percent).toFixed(Math.abs(percent) < 10 ? 1 : 0);
  return `${size}% ${percent < 0 ? "slower" : "faster"}`;
}

// ---- Pointing.

const POINTED = ".token, .group, .track rect, [data-tip]";

function describe(target) {
  if (target.dataset.tip) return target.dataset.tip;
  const side = page.sides.find((each) => each.name === target.dataset.side);
  if (target.matches(".token")) return describeToken(side, Number(target.dataset.index));
  const group = describeGroup(side, Number(target.dataset.group));
  if (!target.span) return group;
  const { kind, start_us, end_us } = target.span;
  const from = `${whole.format(start_us)} to ${whole.format(end_us)}`;
  return `${kind}, ${whole.format(end_us - start_us)} µs\n${group}\nfrom ${from} µs`;
}

function describeToken(side, index) {
  const told = (token) => {
    const chance = token.logprob == null ? "" : `, p ${Math.exp(token.logprob).toFixed(3)}`;
    return `${JSON.stringify(token.piece ?? token.text)} (id ${token.id}${chance})`;
  };
  const mine = side.tokens[index];
  const theirs = other(side)?.tokens[index];
  const lines = [`token ${index + 1}: ${told(mine)}`];
  if (theirs) {
    const same = theirs.id === mine.id ? "as does" : "differs from";
    lines.push(`${same} the other side: ${told(theirs)}`);
  }
  const { step, duration_ms } = mine.timeline ?? {};
  if (mine.timeline) lines.push(`step ${step}, ${milliseconds(duration_ms)} ms`);
  return lines.join("\n");
}

function point(target, x, y) {
  const tip = $("#tip");
  tip.hidden = !target;
  const { side, group } = target?.dataset ?? {};
  lit = group === undefined ? null : { side, group: Number(group) };
  light();
  const index = target?.matches(".token") ? Number(target.dataset.index) : selected;
  for (const each of document.querySelectorAll(".token.here")) each.classList.remove("here");
  for (const each of page.sides) each.tokens[index]?.span.classList.add("here");
  if (!target) return;
  tip.textContent = describe(target);
  const room = document.documentElement;
  tip.style.left = `${Math.max(4, Math.min(x + 12, room.clientWidth - tip.offsetWidth - 8))}px`;
  const below = y + 18;
  const fits = below + tip.offsetHeight < room.clientHeight;
  tip.style.top = `${fits ? below : y - tip.offsetHeight - 10}px`;
}

document.addEventListener("pointerover", (event) =>
  point(event.target.closest(POINTED), event.clientX, event.clientY));
document.documentElement.addEventListener("pointerleave", () => point(null));
$("#answers").addEventListener("click", (event) => {
  const token = event.target.closest(".token");
  if (!token || String(getSelection())) return;  // text is being selected
  const index = Number(token.dataset.index);
  selected = selected === index ? null : index;
  paint();
  point(token, event.clientX, event.clientY);
});
$("#latest").addEventListener("click", () => {
  selected = null;
  paint();
  point(null);
});

look();
