"use strict";
// Pointing at a trial lights it up in every figure; filters on the parallel axes, a sortable table, a copy button.
// The page is complete without this script, so a browser that lacks something loses only the convenience.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const cards = JSON.parse(document.getElementById("cards").textContent);
  const card = document.getElementById("card");
  all(".script-only, [data-copy]").forEach((node) => { node.hidden = false; });

  let dragging = null;

  // --- pointing ---------------------------------------------------------------------------------------------------
  function point(trial, x, y) {
    all(".lit").forEach((node) => node.classList.remove("lit"));
    all("svg.plot").forEach((svg) => svg.classList.toggle("pointing", trial !== null && svg.querySelector(`[data-trial="${trial}"]`) !== null));
    card.hidden = trial === null;
    if (trial === null) return;
    all(`[data-trial="${trial}"]`).forEach((node) => node.classList.add("lit"));
    const title = document.createElement("b");
    title.textContent = cards[trial].title;
    const lines = cards[trial].lines.map(([name, value]) => {
      const line = document.createElement("div");
      for (const text of [name, value]) line.appendChild(document.createElement("span")).textContent = text;
      return line;
    });
    card.replaceChildren(title, ...lines);
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
  all("svg[data-walk]").forEach((svg) => {
    const trials = [...new Set(all("[data-trial]", svg).map((node) => node.dataset.trial))].sort((a, b) => a - b);
    let at = -1;
    svg.addEventListener("keydown", (event) => {
      if (event.target !== svg || !trials.length) return;
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) {
        event.preventDefault();
        at = (Math.max(at, step > 0 ? -1 : 0) + step + trials.length) % trials.length;
        const box = svg.querySelector(`[data-trial="${trials[at]}"]`).getBoundingClientRect();
        point(trials[at], box.right, box.top);
      } else if (event.key === "Escape") point(null);
    });
    svg.addEventListener("blur", () => point(null));
  });

  // --- filters on the parallel axes -------------------------------------------------------------------------------
  const output = document.querySelector("[data-filtered]");
  const clear = document.querySelector("[data-clear]");
  const drawings = all("svg[data-brush]").map((svg) => ({
    svg,
    across: svg.dataset.brush,
    axes: all(".brush", svg).map((node) => ({
      node, range: node.querySelector(".range"), start: +node.dataset.start, end: +node.dataset.end, kept: null,
    })),
    lines: all("[data-along]", svg).map((node) => ({ trial: node.dataset.trial, along: JSON.parse(node.dataset.along) })),
  }));

  // Ranges are kept as shares of an axis, so that the wide and the narrow drawing filter alike.
  const share = (axis, pixel) => (pixel - axis.start) / (axis.end - axis.start);
  function keep(index, range) {
    drawings.forEach((drawing) => { drawing.axes[index].kept = range; });
    show();
  }
  function show() {
    if (!drawings.length) return;
    const { axes, lines } = drawings[0];
    const active = axes.some((axis) => axis.kept);
    const passing = new Set(lines.filter(({ along }) => axes.every((axis, index) => {
      if (!axis.kept) return true;
      if (along[index] === null) return false;
      const at = share(axis, along[index]);
      return at >= axis.kept[0] - 1e-3 && at <= axis.kept[1] + 1e-3;
    })).map(({ trial }) => trial));
    all("svg.plot [data-trial], tr[data-trial]").forEach((node) => node.classList.toggle("dim", active && !passing.has(node.dataset.trial)));
    output.textContent = active ? `${passing.size} of ${lines.length} trials` : "all trials";
    clear.disabled = !active;
    drawings.forEach((drawing) => drawing.axes.forEach((axis) => {
      axis.node.classList.toggle("on", axis.kept !== null);
      axis.node.setAttribute("aria-valuenow", passing.size);
      axis.node.setAttribute("aria-valuetext", axis.kept
        ? `from ${Math.round(100 * axis.kept[0])} to ${Math.round(100 * axis.kept[1])} percent of the axis, ${output.textContent}` : output.textContent);
      if (!axis.kept) return;
      const ends = axis.kept.map((part) => axis.start + part * (axis.end - axis.start)).sort((a, b) => a - b);
      const upright = drawing.across === "x";
      axis.range.setAttribute(upright ? "x" : "y", ends[0]);
      axis.range.setAttribute(upright ? "width" : "height", Math.max(2, ends[1] - ends[0]));
    }));
  }
  drawings.forEach((drawing) => drawing.axes.forEach((axis, index) => {
    const place = (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.svg.getScreenCTM().inverse());
      return Math.max(0, Math.min(1, share(axis, point[drawing.across])));
    };
    const strip = axis.node.querySelector(".strip");
    strip.addEventListener("pointerdown", (event) => {
      strip.setPointerCapture(event.pointerId);
      point(null);
      dragging = { from: place(event), moved: false };
      event.preventDefault();
      axis.node.focus();
    });
    strip.addEventListener("pointermove", (event) => {
      if (!dragging) return;
      const to = place(event);
      if (Math.abs(to - dragging.from) < 0.02 && !dragging.moved) return;
      dragging.moved = true;
      keep(index, [Math.min(dragging.from, to), Math.max(dragging.from, to)]);
    });
    const release = () => {
      if (dragging && !dragging.moved) keep(index, null);
      dragging = null;
    };
    strip.addEventListener("pointerup", release);
    strip.addEventListener("pointercancel", release);
    axis.node.addEventListener("keydown", (event) => {
      const step = { ArrowUp: 0.05, ArrowRight: 0.05, ArrowDown: -0.05, ArrowLeft: -0.05 }[event.key];
      if (event.key === "Escape") keep(index, null);
      if (!step) return;
      event.preventDefault();
      const [low, high] = axis.kept ?? [0, 1];
      const range = event.shiftKey ? [low, Math.max(low, Math.min(1, high + step))] : [Math.min(high, Math.max(0, low + step)), high];
      keep(index, range[0] <= 0 && range[1] >= 1 ? null : range);
    });
  }));
  clear?.addEventListener("click", () => {
    drawings.forEach((drawing) => drawing.axes.forEach((axis) => { axis.kept = null; }));
    show();
  });

  // --- the table of trials ----------------------------------------------------------------------------------------
  all("table[data-sortable]").forEach((table) => {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const key = (row) => row.cells[column].dataset.sort;
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          // What is absent stays at the end, whichever way the rest is sorted.
          if (x === "" || y === "") return (x === "") - (y === "");
          const order = Number.isNaN(x - y) ? x.localeCompare(y) : x - y;
          return descending ? -order : order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  });

  // --- copying ----------------------------------------------------------------------------------------------------
  all("[data-copy]").forEach((button) => button.addEventListener("click", async () => {
    const node = document.getElementById(button.dataset.copy);
    const selection = getSelection();
    selection.selectAllChildren(node);
    let copied = true;
    try {
      await navigator.clipboard.writeText(node.textContent);
    } catch {
      // Pages opened from disk have no clipboard in some browsers; the older way takes the selection.
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }));
})();
