// The reader's theme, set before the page is drawn, and boxes that scroll made reachable by keyboard.
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("theme");
  } catch {} // a browser that keeps nothing for files
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";

  const themes = () => {
    const button = document.getElementById("theme");
    const label = () => {
      button.innerHTML = dark() ? "☀ <span>Light</span>" : "☾ <span>Dark</span>";
      button.setAttribute("aria-label", `Switch to the ${dark() ? "light" : "dark"} theme`);
    };
    button.hidden = false;
    label();
    system.addEventListener("change", label);
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      try {
        localStorage.setItem("theme", root.dataset.theme);
      } catch {}
      label();
    });
  };

  // only where there is something to scroll to: a stop of the Tab key for nothing is in the way
  const reach = () => {
    for (const box of document.querySelectorAll(".scroll, .formula, .long, .prose .highlight")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };

  document.addEventListener("DOMContentLoaded", () => {
    themes();
    reach();
    addEventListener("resize", reach);
    document.addEventListener("toggle", reach, true);
  });
})();
