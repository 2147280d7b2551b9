// The page follows the system's light or dark setting; the button overrides it and remembers the choice.
(function () {
  "use strict";
  var root = document.documentElement, button = document.getElementById("theme"), key = "dropkit-theme";
  var system = window.matchMedia("(prefers-color-scheme: dark)");
  function stored() { try { return window.localStorage.getItem(key); } catch (error) { return null; } }
  function dark() { return root.dataset.theme ? root.dataset.theme === "dark" : system.matches; }
  function show() {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours");
    button.setAttribute("aria-pressed", String(dark()));
  }
  var choice = stored();
  if (choice === "dark" || choice === "light") { root.dataset.theme = choice; }
  button.hidden = false;
  button.addEventListener("click", function () {
    root.dataset.theme = dark() ? "light" : "dark";
    try { window.localStorage.setItem(key, root.dataset.theme); } catch (error) { /* a private window forgets */ }
    show();
  });
  system.addEventListener("change", show);
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (part) { part.open = true; });
  });
  show();
})();
