// Escape presses the cancel button of the open tab.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  for (const button of document.querySelectorAll("button.epd-cancel")) {
    if (button.offsetParent !== null && !button.disabled) {
      button.click();
      return;
    }
  }
});

// What Gradio leaves unnamed: regions that change by themselves are announced, and the message box has a name.
const unnamed = {
  "#epd-status": { role: "status", "aria-live": "polite" },
  "#epd-message textarea": { "aria-label": "Message" },
};
new MutationObserver((_, observer) => {
  for (const [selector, attributes] of Object.entries(unnamed)) {
    const element = document.querySelector(selector);
    if (!element) continue;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    delete unnamed[selector];
  }
}).observe(document.documentElement, { childList: true, subtree: true });
