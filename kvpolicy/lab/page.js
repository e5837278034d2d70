// Tells what lies under the pointer. Everything is read off the drawing itself; without this the pictures still stand.
"use strict";
const tip = document.getElementById("tip");

// "M12 40h30v1h-30z…" as [[start, first token, moments, tokens], …]
const boxes = (path) =>
  [...path.getAttribute("d").matchAll(/M(\d+) (\d+)h(\d+)v(\d+)/g)].map((m) => m.slice(1).map(Number));
// "M12 40.5H30…" as [[start, token, stop], …]
const lines = (path) =>
  [...path.getAttribute("d").matchAll(/M(\d+) (\d+)\.5H(\d+)/g)].map((m) => m.slice(1).map(Number));

for (const section of document.querySelectorAll("section")) {
  const facts = JSON.parse(section.querySelector("script").textContent);
  const states = [...section.querySelectorAll("path[data-state]")].map((path) => [path.dataset.state, boxes(path)]);
  const missed = [...section.querySelectorAll("path.missed")].flatMap(lines);
  const plots = [...section.querySelectorAll(".plot")];
  const at = (moment) => "t = " + facts.t[Math.min(moment, facts.t.length - 1)];

  const tokenFacts = (token, moment) => {
    if (token > facts.newest[moment]) return ["token " + token + ": not yet said"];
    const said = ["token " + token + (token < facts.prompt ? " (prompt)" : " (generated)")];
    let left = 0, entered = Infinity, now = null;
    for (const [state, all] of states)
      for (const [start, first, wide, high] of all)
        if (first <= token && token < first + high) {
          left = Math.max(left, start + wide);
          entered = Math.min(entered, start);
          if (start <= moment && moment < start + wide) now = state;
        }
    if (now) said.push(now + ", here since " + at(entered));
    const stays = left >= facts.t.length;
    said.push(stays ? "stays to the end" : now ? "leaves at " + at(left) : "evicted at " + at(left));
    const mine = missed.filter((line) => line[1] === token);
    const next = mine.filter((line) => line[2] > moment).map((line) => Math.max(line[0], moment));
    if (next.length) said.push(Math.min(...next) === moment ? "wanted now" : "next wanted at " + at(Math.min(...next)));
    else if (!stays) said.push(mine.length ? "not wanted again" : "not wanted after it left");
    return said;
  };

  const show = (event) => {
    const plot = event.currentTarget, box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width, depth = (event.clientY - box.top) / box.height;
    const moment = Math.max(0, Math.min(facts.t.length - 1, Math.floor(share * facts.t.length)));
    const said = [at(moment)];
    if (plot.dataset.tokens) {
      const token = Math.max(0, Math.min(facts.tokens - 1, Math.floor(depth * facts.tokens)));
      said.push(...tokenFacts(token, moment));
    }
    for (const pool of facts.pools) {
      const budget = pool.budget[moment];
      said.push(pool.name + ": " + pool.resident[moment] + " tokens" + (budget === null ? "" : ", budget " + budget));
    }
    said.push("attention kept: " + (100 * facts.mass[moment]).toFixed(1) + " %");
    tip.textContent = said.join("\n");
    tip.hidden = false;
    const right = event.clientX > innerWidth / 2, low = event.clientY > innerHeight / 2;
    tip.style.transform = `translate(${event.clientX + (right ? -12 : 12)}px, ${event.clientY + (low ? -12 : 12)}px)` +
      ` translate(${right ? "-100%" : "0"}, ${low ? "-100%" : "0"})`;
    for (const each of plots) {
      const now = each.querySelector(".now");
      now.hidden = false;
      now.style.left = (100 * (moment + 0.5)) / facts.t.length + "%";
    }
  };
  const hide = () => {
    tip.hidden = true;
    for (const each of plots) each.querySelector(".now").hidden = true;
  };
  for (const plot of plots) {
    plot.addEventListener("pointermove", show);
    plot.addEventListener("pointerdown", show);
    plot.addEventListener("pointerleave", hide);
  }
}
