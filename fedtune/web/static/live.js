// Follows one run while its page is visible. It keeps no history: each event overwrites the line before it.
(() => {
  "use strict";
  const line = document.getElementById("live");
  const bar = document.getElementById("progress");
  const count = document.getElementById("rounds-done");
  if (!line || !window.EventSource) return;
  const known = Number(line.dataset.rounds);
  let source = null, heard = 0, timer = 0;

  const say = (state, words) => { line.dataset.state = state; if (line.firstElementChild.textContent !== words) line.firstElementChild.textContent = words; };
  const close = () => { if (source) source.close(); source = null; clearInterval(timer); };
  const hear = () => { heard = Date.now(); };

  const show = event => {
    hear();
    const run = JSON.parse(event.data);
    if (bar) bar.value = run.rounds;
    if (count) count.textContent = `${run.rounds} of ${run.planned} rounds`;
    line.lastElementChild.hidden = run.rounds === known && run.status === line.dataset.status;
    if (run.status !== "running" && run.status !== "queued") { close(); say("ended", `The run is ${run.status}.`); }
    else say("live", "Live");
  };
  const open = () => {
    if (source || document.hidden) return;
    hear();
    source = new EventSource(line.dataset.events);
    source.addEventListener("run", show);
    source.addEventListener("beat", () => { hear(); say("live", "Live"); });
    timer = setInterval(() => { if (Date.now() - heard > 15000) say("stale", "Not live. Trying again."); }, 5000);
  };
  document.addEventListener("visibilitychange", () => document.hidden ? close() : line.dataset.state !== "ended" && open());
  window.addEventListener("pagehide", close);
  open();
})();
