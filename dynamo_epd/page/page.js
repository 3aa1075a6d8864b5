// Escape presses the cancel button of the open tab. Regions that change by themselves are announced.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  for (const button of document.querySelectorAll("button.epd-cancel")) {
    if (button.offsetParent !== null && !button.disabled) {
      button.click();
      return;
    }
  }
});
new MutationObserver((_, observer) => {
  const status = document.getElementById("epd-status");
  if (!status) return;
  status.setAttribute("role", "status");
  status.setAttribute("aria-live", "polite");
  observer.disconnect();
}).observe(document.documentElement, { childList: true, subtree: true });
