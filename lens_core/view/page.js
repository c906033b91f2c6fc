(() => {
  "use strict";

  for (const root of document.querySelectorAll(".lens:not([data-ready])")) {
    root.dataset.ready = "";
    const tip = tooltip(root);
    for (const text of root.querySelectorAll(".lens-tokens .lens-text, .lens-cells tbody")) tokenLine(text, tip);
    for (const figure of root.querySelectorAll(".lens-attention")) attention(figure, tip);
  }

  function element(tag, className, parent, text) {
    const made = document.createElement(tag);
    made.className = className;
    if (text !== undefined) made.textContent = text; // never as HTML
    if (parent) parent.append(made);
    return made;
  }

  // One label that follows the pointer, or stands under what has the focus.
  function tooltip(root) {
    const box = element("div", "lens-tip", root);
    box.setAttribute("role", "status");
    box.hidden = true;
    return {
      show(text, x, y) {
        box.textContent = text;
        box.hidden = false;
        const area = root.getBoundingClientRect();
        const room = Math.max(0, area.width - box.offsetWidth - 8);
        box.style.left = `${Math.min(Math.max(8, x - area.left + 12), room)}px`;
        box.style.top = `${y - area.top + 18}px`;
      },
      hide() { box.hidden = true; },
    };
  }

  // Make a group one stop of the tab key; the arrow keys, Home and End move inside it.
  function arrowKeys(group, items) {
    items.forEach((item, i) => { item.tabIndex = i ? -1 : 0; });
    group.addEventListener("focusin", (event) => {
      if (items.includes(event.target)) items.forEach((item) => { item.tabIndex = item === event.target ? 0 : -1; });
    });
    group.addEventListener("keydown", (event) => {
      const at = items.indexOf(event.target);
      const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: items.length - 1 }[event.key];
      if (at < 0 || !items[to]) return;
      event.preventDefault();
      items[to].focus();
    });
  }

  function tokenLine(text, tip) {
    const items = [...text.querySelectorAll(".lens-token, .lens-cell")];
    for (const item of items) {
      item.dataset.tip = item.title; // shown at once, unlike a title
      item.removeAttribute("title");
    }
    const show = (event, item) => {
      const area = item.getBoundingClientRect();
      tip.show(item.dataset.tip, event.clientX ?? area.left, event.clientY ?? area.bottom - 12);
    };
    text.addEventListener("pointermove", (event) => (items.includes(event.target) ? show(event, event.target) : tip.hide()));
    text.addEventListener("pointerleave", tip.hide);
    text.addEventListener("focusin", (event) => show({}, event.target));
    text.addEventListener("focusout", tip.hide);
    arrowKeys(text, items);
  }

  // data.heads[h].rows[q][k] counts units; a row's missing end is zero (masked, where causal), null is no value.
  function attention(figure, tip) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const size = data.tokens.length;
    const named = (i) => `\u2068${data.tokens[i]}\u2069 (${i})`; // isolated: it may run from right to left
    const masked = (q, k) => data.causal && k > q;
    const count = (h, q, k) => (data.heads[h].rows[q][k] === undefined ? 0 : data.heads[h].rows[q][k]);
    const number = (cell) => (cell === null ? "no value" : (cell * data.unit).toFixed(data.decimals).replace("-", "−"));
    const buttons = [...figure.querySelectorAll(".lens-head")];
    const panel = detail(figure.querySelector(".lens-detail"), data);
    let head = data.first;
    let query = size - 1;

    function paint(canvas, h, ramps) {
      canvas.width = canvas.height = size;
      canvas.style.imageRendering = size < 256 ? "pixelated" : "auto";
      const context = canvas.getContext("2d");
      const image = context.createImageData(size, size);
      for (let q = 0; q < size; q++) {
        for (let k = 0; k < size; k++) {
          const cell = count(h, q, k);
          const share = Math.min(255, Math.round((Math.abs(cell ?? 0) / 10000) * 255));
          const colour = masked(q, k) || cell === null ? ramps.masked : (cell < 0 ? ramps.negative : ramps.positive)[share];
          image.data.set(colour, 4 * (q * size + k));
        }
      }
      context.putImageData(image, 0, 0);
    }

    function paintAll() {
      const ramps = colours(figure);
      buttons.forEach((button, h) => paint(button.querySelector("canvas"), h, ramps));
      paint(panel.canvas, head, ramps);
    }

    // Shade the text by what token q attends to, and list the most.
    function read(q) {
      const cells = data.tokens.map((_, k) => count(head, q, k));
      const most = Math.max(...cells.map((cell) => Math.abs(cell ?? 0)), 1);
      panel.tokens.forEach((token, k) => {
        token.style.setProperty("--v", Math.abs(cells[k] ?? 0) / 10000);
        token.className = `lens-token ${cells[k] < 0 ? "neg" : "pos"}${k === q ? " query" : ""}`;
      });
      panel.top.replaceChildren();
      element("p", "lens-muted", panel.top, `${named(q)} reads most from`);
      const order = cells.map((_, k) => k).filter((k) => cells[k]).sort((a, b) => Math.abs(cells[b]) - Math.abs(cells[a]));
      for (const k of order.slice(0, 5)) {
        const line = element("div", "", panel.top);
        element("b", "", line, named(k));
        element("i", cells[k] < 0 ? "neg" : "", line).style.width = `${(100 * Math.abs(cells[k])) / most}%`;
        element("span", "", line, number(cells[k]));
      }
      panel.place(q);
    }

    function choose(h) {
      head = h;
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === h)));
      panel.name.textContent = data.heads[h].label;
      panel.canvas.setAttribute("aria-label", buttons[h].getAttribute("aria-label"));
      paint(panel.canvas, head, colours(figure));
      read(query);
    }

    function hover(canvas, which) {
      canvas.addEventListener("pointermove", (event) => {
        const area = canvas.getBoundingClientRect();
        const at = (share) => Math.min(size - 1, Math.max(0, Math.floor(share * size)));
        const q = at((event.clientY - area.top) / area.height);
        const k = at((event.clientX - area.left) / area.width);
        const value = masked(q, k) ? "masked" : number(count(which(), q, k));
        tip.show(`${named(q)} → ${named(k)}: ${value}`, event.clientX, event.clientY);
        if (which() === head) read(q);
        panel.mark(q, k);
      });
      canvas.addEventListener("pointerleave", () => { tip.hide(); panel.mark(-1, -1); read(query); });
    }

    buttons.forEach((button, h) => {
      button.addEventListener("click", () => choose(h));
      hover(button.querySelector("canvas"), () => h);
    });
    hover(panel.canvas, () => head);
    panel.tokens.forEach((token, i) => {
      token.addEventListener("pointerenter", () => read(i));
      token.addEventListener("pointerleave", () => read(query));
      token.addEventListener("click", () => { query = i; read(i); });
      token.addEventListener("focus", () => { query = i; read(i); });
    });
    arrowKeys(figure.querySelector(".lens-heads"), buttons);
    arrowKeys(panel.text, panel.tokens);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintAll);
    paintAll();
    choose(head);
  }

  // The large heat map with its axes, and the text beside it.
  function detail(parent, data) {
    const size = data.tokens.length;
    const plot = element("div", "lens-plot", parent);
    const map = element("div", "lens-map", plot);
    const canvas = element("canvas", "", map);
    canvas.setAttribute("role", "img");
    const [row, column] = [element("i", "", map), element("i", "", map)];
    const every = Math.max(1, Math.ceil((size * 12) / 400)); // a label needs 12 of about 400 pixels
    for (const axis of ["y", "x"]) {
      const line = element("div", `lens-axis ${axis}`, plot);
      line.setAttribute("aria-hidden", "true");
      for (let i = 0; i < size; i += every) {
        element("span", "lens-label", line, data.tokens[i]).style[axis === "y" ? "top" : "left"] = `${(100 * (i + 0.5)) / size}%`;
      }
    }
    const side = element("div", "", parent);
    const name = element("p", "lens-name", side);
    element("p", "lens-muted", side, "Point at a token, or move with the arrow keys, to see what it attends to.");
    const text = element("div", "lens-text", side);
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", "the text; the chosen token's attention is listed below it");
    const tokens = data.tokens.map((token) => element("span", "lens-token", text, token));
    const top = element("div", "lens-top", side);
    top.setAttribute("aria-live", "polite");
    const put = (box, top, left, height, width) => {
      Object.assign(box.style, { top: `${top}%`, left: `${left}%`, height: `${height}%`, width: `${width}%` });
    };
    const place = (q) => put(row, (100 * q) / size, 0, 100 / size, 100);
    column.hidden = true;
    return {
      canvas, name, text, tokens, top, place,
      mark(q, k) {
        if (q >= 0) place(q);
        column.hidden = k < 0;
        put(column, 0, (100 * k) / size, 100, 100 / size);
        tokens.forEach((token, i) => {
          if (q >= 0) token.classList.toggle("query", i === q);
          token.classList.toggle("key", i === k && k !== q);
        });
      },
    };
  }

  // The style's ramps, as 256 colours each.
  function colours(figure) {
    const style = getComputedStyle(figure);
    const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.trim().slice(i, i + 2), 16));
    const ramp = (name) => {
      const stops = style.getPropertyValue(name).split(",").map(rgb);
      return Array.from({ length: 256 }, (_, i) => {
        const at = (i / 255) * (stops.length - 1);
        const low = Math.min(Math.floor(at), stops.length - 2);
        return [...stops[low].map((c, j) => Math.round(c + (stops[low + 1][j] - c) * (at - low))), 255];
      });
    };
    return { positive: ramp("--ramp"), negative: ramp("--negative-ramp"), masked: [...rgb(style.getPropertyValue("--masked")), 255] };
  }
})();
