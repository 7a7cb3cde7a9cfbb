// Dark or light: the reader's choice, kept; without one, the system's. Runs before the page is drawn.
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
  document.addEventListener("DOMContentLoaded", () => {
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
  });
})();
