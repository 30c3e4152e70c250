"use strict";
const sessions = JSON.parse(document.getElementById("sessions").textContent);
const slider = document.getElementById("step");
const last = Math.max(...sessions.map((session) => session.steps.length));
slider.max = String(last);

function element(name, text, className) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function drawing(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, String(value));
  return node;
}

function bar(className, share, mark, label) {
  const box = element("div", undefined, className);
  const picture = drawing("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": label });
  picture.append(drawing("rect", { x: 0, y: 0, width: 100 * Math.min(Math.max(share, 0), 1), height: 10 }));
  if (mark !== null) {
    const place = 100 * Math.min(Math.max(mark, 0), 1);
    picture.append(drawing("line", { x1: place, x2: place, y1: 0, y2: 10, "vector-effect": "non-scaling-stroke" }));
  }
  box.append(picture);
  return box;
}

const percent = (value) => `${Math.round(100 * value)} %`;
const signed = (value) => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(2)}`;
const sum = (values) => values.reduce((total, value) => total + value, 0);

function facts(pairs) {
  const list = element("dl");
  for (const [name, value, className] of pairs) {
    list.append(element("dt", name), element("dd", value, className));
  }
  return list;
}

function belief(session, step) {
  const now = session.states[step];
  const before = session.states[Math.max(step - 1, 0)];
  const from = (text, old) => (step > 0 && old !== text ? `${old} \u2192 ${text}` : text);
  const level = (state) => `${signed(state.level)} \u00b1 ${state.level_deviation.toFixed(2)}`;
  const clicks = (state) => `${state.best_clicks.toFixed(1)} clicks`;
  return facts([
    ["Level", from(level(now), level(before))],
    ["Taste known", from(percent(now.taste_certainty), percent(before.taste_certainty))],
    ["Best slate", from(clicks(now), clicks(before))],
  ]);
}

function card(slate, place) {
  const clicked = slate.clicks[place];
  const item = element("li", undefined, clicked ? "clicked" : "");
  const id = element("span", slate.ids[place], "id");
  id.title = slate.ids[place];
  item.append(id, element("span", slate.popular[place] ? "\u2605 popular" : "long tail", "group"));
  item.append(bar("chance", slate.before[place], null, `predicted ${percent(slate.before[place])}`));
  item.append(element("span", `${percent(slate.before[place])} \u2192 ${percent(slate.after[place])} `, "number"));
  item.append(element("span", clicked ? "\u2713 clicked" : "skipped", clicked ? "clicked-mark" : "answer"));
  return item;
}

function agent(session, step) {
  const box = element("article", undefined, "agent");
  box.append(element("h2", session.title));
  const shown = Math.min(step, session.steps.length);
  const over = shown === session.steps.length;
  const temper = session.tempers[shown];
  const start = session.tempers[0] || 1;
  const mark = session.leaveBelow === null ? null : session.leaveBelow / start;
  box.append(bar("temper", temper / start, mark, `temper ${temper.toFixed(1)} of ${start.toFixed(1)}`));
  const past = session.steps.slice(0, shown);
  const slate = past[shown - 1];
  const state = over ? `over after ${shown} slates: ${session.reason ?? "left"}` : "running";
  const pairs = [
    ["Session", state, over ? "unfair" : ""],
    ["Temper", `${temper.toFixed(1)} of ${start.toFixed(1)}${mark === null ? "" : `, leaves below ${session.leaveBelow}`}`],
    ["R_cum", sum(past.map((one) => one.reward)).toFixed(2)],
  ];
  if (slate) {
    pairs.push(["Slate", `reward ${slate.reward.toFixed(2)}, ${percent(slate.share)} popular`]);
    if (slate.unfair) pairs.push(["", "unfair: costs extra temper", "unfair"]);
  }
  box.append(facts(pairs), element("h4", "Belief"), belief(session, shown));
  if (slate) {
    const cards = element("ol", undefined, "cards");
    slate.ids.forEach((_, place) => cards.append(card(slate, place)));
    box.append(cards);
  } else {
    box.append(element("p", "Nothing was shown yet."));
  }
  return box;
}

function show(step) {
  const place = Math.min(Math.max(step, 0), last);
  slider.value = String(place);
  document.getElementById("place").textContent = place === 0 ? "start" : `slate ${place} of ${last}`;
  document.getElementById("back").disabled = place === 0;
  document.getElementById("on").disabled = place === last;
  document.getElementById("agents").replaceChildren(...sessions.map((session) => agent(session, place)));
}

slider.addEventListener("input", () => show(Number(slider.value)));
document.getElementById("back").addEventListener("click", () => show(Number(slider.value) - 1));
document.getElementById("on").addEventListener("click", () => show(Number(slider.value) + 1));
document.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: Number(slider.value) - 1, ArrowRight: Number(slider.value) + 1, Home: 0, End: last };
  if (event.key in steps && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    show(steps[event.key]);
  }
});
show(0);
