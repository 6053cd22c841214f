"use strict";
// Pointing at a trial lights it up in every figure; filters on the parallel axes, a sortable table, a copy button. Where
// the page is served, it follows the study.
// The page is complete without this script, so a browser that lacks something loses only the convenience.
//
// What the reader has chosen is kept here and not in the document, so that it can be put on a newer version of the page
// before the two are compared: `dress` does that. Listeners are on the document, since elements come and go.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  let cards = JSON.parse(document.getElementById("cards").textContent);
  const card = document.getElementById("card");
  const reader = { pointed: null, sorted: null, kept: {}, opened: new Set() };
  let dragging = null;

  function dress(root) {
    all(".script-only, [data-copy]", root).forEach((node) => { node.hidden = false; });
    all("details", root).forEach((node) => { node.open = reader.opened.has(nameOf(node)); });
    all("table[data-sortable]", root).forEach(sort);
    filter(root);
    light(root);
    tick(root);
  }

  // --- pointing ---------------------------------------------------------------------------------------------------
  function light(root) {
    all(".lit", root).forEach((node) => node.classList.remove("lit"));
    const lit = reader.pointed === null ? [] : all(`[data-trial="${reader.pointed}"]`, root);
    lit.forEach((node) => node.classList.add("lit"));
    all("svg.plot", root).forEach((svg) => svg.classList.toggle("pointing", lit.some((node) => svg.contains(node))));
  }
  function fill() {
    card.hidden = reader.pointed === null || !cards[reader.pointed];
    if (card.hidden) return;
    const title = document.createElement("b");
    title.textContent = cards[reader.pointed].title;
    const lines = cards[reader.pointed].lines.map(([name, value]) => {
      const line = document.createElement("div");
      for (const text of [name, value]) line.appendChild(document.createElement("span")).textContent = text;
      return line;
    });
    card.replaceChildren(title, ...lines);
  }
  function point(trial, x, y) {
    reader.pointed = trial;
    light(document);
    fill();
    if (card.hidden) return;
    const width = card.offsetWidth, height = card.offsetHeight;
    card.style.left = `${Math.max(8, x + 16 + width > innerWidth ? x - width - 16 : x + 16)}px`;
    card.style.top = `${Math.max(8, Math.min(y + 14, innerHeight - height - 8))}px`;
  }
  document.addEventListener("pointerover", (event) => {
    if (dragging) return;
    const node = event.target.closest("svg.plot [data-trial]");
    if (node) point(node.dataset.trial, event.clientX, event.clientY);
    else if (!card.hidden) point(null);
  });

  // Arrow keys walk through a figure's trials.
  document.addEventListener("keydown", (event) => {
    if (!event.target.matches("svg[data-walk]")) return;
    const trials = [...new Set(all("[data-trial]", event.target).map((node) => node.dataset.trial))].sort((a, b) => a - b);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step && trials.length) {
      event.preventDefault();
      const at = trials.indexOf(reader.pointed);
      const next = trials[(Math.max(at, step > 0 ? -1 : 0) + step + trials.length) % trials.length];
      const box = event.target.querySelector(`[data-trial="${next}"]`).getBoundingClientRect();
      point(next, box.right, box.top);
    } else if (event.key === "Escape") point(null);
  });
  document.addEventListener("focusout", (event) => {
    if (event.target.matches("svg[data-walk]")) point(null);
  });

  // --- filters on the parallel axes -------------------------------------------------------------------------------
  // Ranges are kept as shares of an axis, so that the wide and the narrow drawing filter alike.
  const share = (axis, pixel) => (pixel - axis.dataset.start) / (axis.dataset.end - axis.dataset.start);
  const indexOf = (axis) => all(".brush", axis.ownerSVGElement).indexOf(axis);
  function keep(axis, range) {
    if (range) reader.kept[indexOf(axis)] = range;
    else delete reader.kept[indexOf(axis)];
    filter(document);
  }
  function filter(root) {
    const kept = Object.entries(reader.kept);
    const drawings = all("svg[data-brush]", root);
    if (!drawings.length) return;
    const axes = all(".brush", drawings[0]), lines = all("[data-along]", drawings[0]);
    const passing = new Set(lines.filter((line) => {
      const along = JSON.parse(line.dataset.along);
      return kept.every(([index, range]) => {
        if (along[index] === null) return false;
        const at = share(axes[index], along[index]);
        return at >= range[0] - 1e-3 && at <= range[1] + 1e-3;
      });
    }).map((line) => line.dataset.trial));
    const active = kept.length > 0, told = active ? `${passing.size} of ${lines.length} trials` : "all trials";
    all("svg.plot [data-trial], tr[data-trial]", root).forEach((node) => node.classList.toggle("dim", active && !passing.has(node.dataset.trial)));
    all("[data-filtered]", root).forEach((node) => { node.textContent = told; });
    all("[data-clear]", root).forEach((node) => { node.disabled = !active; });
    drawings.forEach((svg) => all(".brush", svg).forEach((axis, index) => {
      const range = reader.kept[index];
      axis.classList.toggle("on", range !== undefined);
      axis.setAttribute("aria-valuenow", passing.size);
      axis.setAttribute("aria-valuetext", range
        ? `from ${Math.round(100 * range[0])} to ${Math.round(100 * range[1])} percent of the axis, ${told}` : told);
      if (!range) return;
      const [start, end] = [+axis.dataset.start, +axis.dataset.end];
      const ends = range.map((part) => start + part * (end - start)).sort((a, b) => a - b);
      const upright = svg.dataset.brush === "x", bar = axis.querySelector(".range");
      bar.setAttribute(upright ? "x" : "y", ends[0]);
      bar.setAttribute(upright ? "width" : "height", Math.max(2, ends[1] - ends[0]));
    }));
  }
  function place(event, axis) {
    const svg = axis.ownerSVGElement;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return Math.max(0, Math.min(1, share(axis, at[svg.dataset.brush])));
  }
  document.addEventListener("pointerdown", (event) => {
    const axis = event.target.matches(".strip") && event.target.closest(".brush");
    if (!axis) return;
    event.target.setPointerCapture(event.pointerId);
    point(null);
    dragging = { axis, from: place(event, axis), moved: false };
    event.preventDefault();
    axis.focus();
  });
  document.addEventListener("pointermove", (event) => {
    if (!dragging) return;
    const to = place(event, dragging.axis);
    if (Math.abs(to - dragging.from) < 0.02 && !dragging.moved) return;
    dragging.moved = true;
    keep(dragging.axis, [Math.min(dragging.from, to), Math.max(dragging.from, to)]);
  });
  function release() {
    if (dragging && !dragging.moved) keep(dragging.axis, null);
    dragging = null;
  }
  document.addEventListener("pointerup", release);
  document.addEventListener("pointercancel", release);
  document.addEventListener("keydown", (event) => {
    if (!event.target.matches(".brush")) return;
    const step = { ArrowUp: 0.05, ArrowRight: 0.05, ArrowDown: -0.05, ArrowLeft: -0.05 }[event.key];
    if (event.key === "Escape") keep(event.target, null);
    if (!step) return;
    event.preventDefault();
    const [low, high] = reader.kept[indexOf(event.target)] ?? [0, 1];
    const range = event.shiftKey ? [low, Math.max(low, Math.min(1, high + step))] : [Math.min(high, Math.max(0, low + step)), high];
    keep(event.target, range[0] <= 0 && range[1] >= 1 ? null : range);
  });

  // --- the table of trials ----------------------------------------------------------------------------------------
  function sort(table) {
    const heads = all("thead th", table);
    heads.filter((head) => !head.querySelector("button")).forEach((head) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.sorts = "";
      button.append(...head.childNodes);
      head.append(button);
    });
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    if (!reader.sorted) return;
    const { column, descending } = reader.sorted;
    heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.sort;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      // What is absent stays at the end, whichever way the rest is sorted.
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = Number.isNaN(x - y) ? x.localeCompare(y) : x - y;
      return descending ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }

  // --- buttons and folds --------------------------------------------------------------------------------------------
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if ("clear" in button.dataset) {
      reader.kept = {};
      filter(document);
    } else if ("sorts" in button.dataset) {
      const column = button.closest("th").cellIndex;
      reader.sorted = { column, descending: reader.sorted?.column === column && !reader.sorted.descending };
      sort(button.closest("table"));
      button.focus();
    } else if ("copy" in button.dataset) {
      const node = document.getElementById(button.dataset.copy);
      getSelection().selectAllChildren(node);
      let copied = true;
      try {
        await navigator.clipboard.writeText(node.textContent);
      } catch {
        // Pages opened from disk have no clipboard in some browsers; the older way takes the selection.
        copied = document.execCommand("copy");
      }
      button.textContent = copied ? "Copied" : "Press Ctrl+C";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    }
  });
  const nameOf = (details) => [details.parentNode.querySelector(":scope > figcaption"), details.querySelector("summary")].map((node) => node?.textContent).join();
  document.addEventListener("toggle", (event) => {
    if (!event.target.matches("details")) return;
    if (event.target.open) reader.opened.add(nameOf(event.target));
    else reader.opened.delete(nameOf(event.target));
  }, true);

  // --- following a study that runs ------------------------------------------------------------------------------------
  const QUIET_SECONDS = 120, PAUSE_MS = 2000, PAUSE_AT_THE_END_MS = 10000, WAIT_MS = 10000;
  const source = document.body.dataset.refresh;
  const connection = document.getElementById("connection");
  let tag = "", read = new Date(), timer = 0;

  function ago(seconds) {
    if (seconds < 5) return "just now";
    if (seconds < 100) return `${Math.round(seconds)} s ago`;
    return seconds < 5400 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
  }
  // A page on disk keeps its times; beside a running study, how long ago it was says more.
  function tick(root) {
    if (!source) return;
    const now = Date.now() / 1000;
    all("time[data-since]", root).forEach((node) => { node.textContent = ago(now - node.dataset.since); });
    all("[data-quiet]", root).forEach((node) => { node.hidden = now - node.dataset.quiet < QUIET_SECONDS; });
  }

  // Makes an element equal to a fresh one and leaves alone whatever is equal already, so that focus, selected text and
  // scrolled regions stay as they are.
  function patch(old, fresh) {
    if (old.isEqualNode(fresh)) return;
    if (old.nodeType !== Node.ELEMENT_NODE) {
      old.data = fresh.data;
      return;
    }
    for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    const present = [...old.childNodes], wanted = [...fresh.childNodes];
    wanted.forEach((node, index) => {
      const there = present[index];
      if (!there) old.append(node);
      else if (there.nodeName !== node.nodeName) there.replaceWith(node);
      else patch(there, node);
    });
    present.slice(wanted.length).forEach((node) => node.remove());
  }
  // The sections are told apart by their ids: some are there only for a time.
  function patchSections(main, fresh) {
    const wanted = new Set([...fresh.children].map((section) => section.id));
    [...main.children].filter((section) => !wanted.has(section.id)).forEach((section) => section.remove());
    let at = main.firstElementChild;
    for (const section of [...fresh.children]) {
      if (at?.id === section.id) {
        patch(at, section);
        at = at.nextElementSibling;
      } else main.insertBefore(section, at);
    }
  }
  function show(view) {
    const fresh = document.createElement("template");
    fresh.innerHTML = `<header>${view.head}</header><main>${view.main}</main>`;
    const page = document.importNode(fresh.content, true);
    cards = view.cards;
    dress(page);
    patch(document.querySelector("body > header"), page.querySelector("header"));
    patchSections(document.querySelector("body > main"), page.querySelector("main"));
    document.title = view.title;
    fill();
  }
  async function refresh() {
    const begun = performance.now();
    clearTimeout(timer);
    let ended = false;
    try {
      const answer = await fetch(source, {
        headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store", signal: AbortSignal.timeout(WAIT_MS),
      });
      if (answer.status === 200) {
        const view = await answer.json();
        if (view.version !== document.body.dataset.version) location.reload();
        // A range that is being drawn is not disturbed; what is new waits for the next time.
        if (!dragging) {
          show(view);
          tag = answer.headers.get("ETag");
        }
      } else if (answer.status !== 304) throw new Error(answer.statusText);
      ended = document.querySelector(".pill.done") !== null;
      read = new Date();
      connection.hidden = true;
    } catch {
      connection.textContent = `The server of this page does not answer. Shown is the state of ${read.toLocaleTimeString()}; it goes on by itself when the server is back.`;
      connection.hidden = false;
    }
    // A large page is asked for less often, so that it never keeps a browser busy.
    clearTimeout(timer);
    timer = setTimeout(refreshIfSeen, Math.max(ended ? PAUSE_AT_THE_END_MS : PAUSE_MS, 5 * (performance.now() - begun)));
  }
  // A page in the background rests until it is looked at again.
  function refreshIfSeen() {
    if (!document.hidden) refresh();
  }

  dress(document);
  if (source) {
    document.addEventListener("visibilitychange", refreshIfSeen);
    setInterval(() => tick(document), 1000);
    refreshIfSeen();
  }
})();
