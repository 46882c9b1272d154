// The page's state: the service, its models, and the answers as they stream. drawing.js draws it.
"use strict";

const KINDS = ["attention", "feed forward", "attention exchange", "output exchange", "head"];
const KEY = "cqil.api-key";
const PAINT_EVERY_MS = 120;  // the browser may share its cores with the ranks
const SPARK_STEPS = 100;
const TIMELINES = 500;  // timelines that are kept, each with more than a hundred spans
const DENSE = 48;  // a plan with more columns has no room for layer numbers
const STEP_HINT =
  "Time of this side's own steps, from sending a step to the ranks until all have answered. Not " +
  "the time between arrivals: both sides take turns on the same ranks, and that would count the " +
  "other side's steps too.";

const $ = (selector, root = document) => root.querySelector(selector);
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const milliseconds = (value) => value.toFixed(value < 10 ? 2 : 1);
const bytes = (value) =>
  value >= 1e9 ? `${(value / 1e9).toFixed(1)} GB` : `${Math.round(value / 1e6)} MB`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  const { dataset = {}, ...others } = properties;
  Object.assign(element, others);
  Object.assign(element.dataset, dataset);
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// ---- The server.

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Error("the server cannot be reached");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    $("#key-form").hidden = false;
    $("#key").focus();
  }
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error?.message ?? `the server answered with status ${response.status}`);
}

/** The values of a stream of server-sent events, which ends with [DONE]. */
async function* events(response) {
  let unread = "";
  let done = false;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const blocks = (unread + part.value).split("\n\n");
      unread = blocks.pop();
      for (const block of blocks) {
        if (!block.startsWith("data: ")) continue;
        const data = block.slice("data: ".length);
        if (data === "[DONE]") done = true;
        else yield JSON.parse(data);
      }
    }
    if (!done) throw new Error("the stream broke off");
  } finally {
    reader.cancel().catch(() => {});  // hangs up if the stream goes on
  }
}

// ---- One side: a model, its answer so far, and its part of the page.

class Side {
  constructor(name, model) {
    this.name = name;
    this.model = model;
    this.groups = model.plan.groups;
    this.sequential = isSequential(model);
    this.title = this.sequential ? "Original" : "Concurrent";
    this.root = $("#side-template").content.cloneNode(true).firstElementChild;
    this.root.id = name;
    this.find = (selector) => $(selector, this.root);
    this.find("h2").textContent = this.title;
    this.find(".title .model").textContent = model.name;
    this.find(".depth").textContent = this.groups.length;
    this.find(".exchanges").textContent = model.exchanges_per_token;
    for (const element of this.root.querySelectorAll(".timed")) element.title = STEP_HINT;
    this.clear("");
  }

  set state(value) { this.root.dataset.state = value; }
  get state() { return this.root.dataset.state; }

  clear(prompt) {
    this.tokens = [];  // {id, text, piece: the token's own text, logprob, timeline, span}
    this.durations = [];  // of decode steps, ms
    this.last = null;  // timeline of the latest of them
    this.find(".echo").textContent = prompt;
    this.find(".tokens").replaceChildren();
    this.find(".ending").textContent = "";
    show(this.find(".notice"), "");
    this.state = "idle";
  }

  async answer(request, signal) {
    this.clear(request.prompt);
    this.state = "waiting";
    const body = JSON.stringify({ ...request, model: this.model.name });
    try {
      const response = await call("/v1/completions", { method: "POST", body, signal });
      for await (const event of events(response)) this.take(event);
      this.end("done");
    } catch (error) {
      if (!signal.aborted) show(this.find(".notice"), error.message);
      this.end(signal.aborted ? "stopped" : "error");
    }
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (!choice) return;
    this.state = "streaming";
    const ids = choice.token_ids ?? [];
    const timeline = choice.timeline;
    // A step that computes the prompt, or lost tokens again, has several tokens and is left out.
    if (timeline && ids.length && this.tokens.length && timeline.request_tokens === 1) {
      this.durations.push(timeline.duration_ms);
      this.last = timeline;
    }
    ids.forEach((id, index) => {
      // An event's text is not its tokens' text: some may be held back and come with a later token.
      const text = index === ids.length - 1 ? choice.text : "";
      const { tokens, token_logprobs } = choice.logprobs ?? {};
      this.add({ id, text, piece: tokens?.[index], logprob: token_logprobs?.[index], timeline });
    });
    if (!ids.length && choice.text) this.find(".tokens").append(choice.text);
    if (choice.finish_reason) this.find(".ending").textContent = `  ${choice.finish_reason}`;
    paintSoon();
  }

  add(token) {
    const index = this.tokens.length;
    const span = make("span", { className: "token", textContent: token.text });
    Object.assign(span.dataset, { side: this.name, index, id: token.id, agree: "none" });
    span.classList.toggle("newline", /^\n+$/.test(token.text));
    this.tokens.push({ ...token, span });
    if (index >= TIMELINES) delete this.tokens[index - TIMELINES].timeline;
    const box = this.find(".answer");
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    this.find(".tokens").append(span);
    if (atEnd) box.scrollTop = box.scrollHeight;
    compare(index);
  }

  end(state) {
    paint();
    this.state = state;
  }

  /** The timeline of the step that is drawn: the latest, or that of the token that was clicked. */
  get shown() {
    return selected === null ? this.last : this.tokens[selected]?.timeline ?? null;
  }
}

const isSequential = (model) => model.plan.groups.every((group) => group.layers.length === 1);

const page = { sides: [], ranks: [], running: null, steps: SPARK_STEPS };
let selected = null;  // the index of the token that was clicked
let lit = null;  // the {side, group} under the pointer

const other = (side) => page.sides.find((each) => each !== side);

function compare(index) {
  const both = page.sides.map((side) => side.tokens[index]);
  if (both.length < 2 || !both[0] || !both[1]) return;
  const agree = both[0].id === both[1].id ? "agree" : "differ";
  for (const token of both) token.span.dataset.agree = agree;
}

// ---- Asking.

async function generate() {
  if (page.running || $("#generate").disabled || !$("#ask").reportValidity()) return;
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const request = {
    prompt: $("#prompt").value,
    max_tokens: number("#max-tokens"),
    temperature: number("#temperature"),
    seed: number("#seed"),
    stream: true,
    logprobs: 0,
    return_token_ids: true,
    return_timeline: true,
  };
  const run = (page.running = new AbortController());
  const button = $("#generate");
  button.textContent = "Stop";
  button.dataset.state = "running";
  page.steps = Math.min(request.max_tokens ?? SPARK_STEPS, SPARK_STEPS);
  selected = null;
  lookSoon();
  await Promise.all(page.sides.map((side) => side.answer(request, run.signal)));
  page.running = null;
  button.textContent = "Generate";
  button.dataset.state = "idle";
  paint();
  lookSoon(500);  // not at once: the slots of a run that was stopped take a step to be freed
}

$("#generate").addEventListener("click", () => (page.running ? page.running.abort() : generate()));
$("#ask").addEventListener("submit", (event) => event.preventDefault());
$("#ask").addEventListener("keydown", (event) => {
  const enters = event.key === "Enter" && !event.isComposing && event.target.id !== "generate";
  if (!enters || event.shiftKey) return;  // shift-enter makes a new line
  event.preventDefault();
  generate();
});
$("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("#key").value);
  $("#key-form").hidden = true;
  look();
});

// ---- The service's state, asked for often while it changes, and rarely or not at all otherwise.

const BUSY_MS = 2000;
const IDLE_MS = 20000;
let looking = 0;
document.addEventListener("visibilitychange", () => look());

function lookSoon(after_ms = BUSY_MS) {
  clearTimeout(looking);
  looking = setTimeout(look, after_ms);
}

async function look() {
  clearTimeout(looking);
  looking = 0;
  if (document.hidden && !page.running) return;
  const place = $("#service");
  try {
    const status = await (await call("/status")).json();
    show($("#notice"), "");
    setUp(status);
    const nodes = new Set(status.ranks.map((rank) => rank.node_id)).size;
    const detail = status.state_detail && `: ${status.state_detail}`;
    place.dataset.state = status.state;
    place.textContent =
      `${status.state}${detail} · ${plural(status.ranks.length, "rank")} on ` +
      `${plural(nodes, "node")} · ${status.free_slots} of ${status.slots} slots free`;
  } catch (error) {
    place.dataset.state = "unknown";
    place.textContent = "no status";
    show($("#notice"), error.message);
    if (!$("#key-form").hidden) return;  // the next look follows the key
  }
  if (looking) return;  // an earlier look has been arranged meanwhile
  lookSoon(page.running || place.dataset.state !== "serving" ? BUSY_MS : IDLE_MS);
}

function setUp(status) {
  const models = status.models;
  if (!page.sides.length) {
    const original = models.length > 1 ? models.find(isSequential) ?? models[1] : null;
    const served = models.find((model) => model !== original);
    if (original) page.sides.push(new Side("left", original));
    page.sides.push(new Side(original || !isSequential(served) ? "right" : "left", served));
    $("#answers").replaceChildren(...page.sides.map((side) => side.root));
    $("#answers").classList.toggle("single", !original);
    $("#served").textContent = `${models[0].name} · ${models[0].dtype}`;
    $("#comparison").hidden = $("#foot-compare").hidden = !original;
    $("#hint").hidden = Boolean(original);
    const plan = isSequential(served) ? examplePlan(served.plan.num_layers) : "...";
    $("#hint-command").textContent =
      `cqil serve ${served.name} --plan ${plan} --compare sequential`;
    $("#timeline").hidden = $("#foot").hidden = $("#generate").disabled = false;
  }
  const ranks = JSON.stringify(status.ranks);
  if (ranks !== page.ranksSeen) {
    page.ranksSeen = ranks;
    page.ranks = status.ranks;
    drawTraces();
    paint();
  }
}

/** A plan of pairs, except for the first and last layers, which tolerate that badly. */
function examplePlan(layers) {
  const start = 2 * Math.round(0.2 * layers);
  const end = start + 2 * Math.floor((layers - 2 - start) / 2);
  return `"P2 S${start} E${end} D1"`;
}
