"""The page: its tabs, its looks, and how pictures go from tab to tab."""

from typing import Any

import gradio as gr
from gradio.themes import Default

from sdjax.app.draw_tab import draw_tab
from sdjax.app.redraw_tab import redraw_tab
from sdjax.app.shared import Shared
from sdjax.app.train_tab import train_tab

FONTS = ("system-ui", "sans-serif")
"""Fonts of the machine; Gradio's own would be fetched from the net."""
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
#title { padding: 2px 0; } #title h1 { margin: 0; font-size: 20px; }
.state { font-size: 14px; line-height: 1.5; overflow-wrap: anywhere; }
.links a { margin: 0 18px 0 0 !important; padding: 0 !important; white-space: nowrap; }
.bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; margin-top: 4px; }
.bar div { height: 100%; background: var(--color-accent); transition: width .2s; }
.problem { padding: 8px 12px; border-radius: 8px; border: 1px solid #dc2626; color: #b91c1c; overflow-wrap: anywhere; }
.dark .problem { color: #fca5a5; }
#draw-parts, #redraw-parts { display: grid; gap: var(--layout-gap); grid-template-columns: 5fr 6fr; }
#draw-parts { grid-template: "asked made" auto "settings made" 1fr / 5fr 6fr; }
#redraw-parts { grid-template: "given asked" min-content "given settings" 1fr "made settings" auto / 6fr 5fr; }
.given { grid-area: given; } .asked { grid-area: asked; } .made { grid-area: made; } .settings { grid-area: settings; }
:is(button, a, input, textarea, [tabindex="0"], [role="tab"], [role="radio"]):focus-visible {
  outline: 2px solid var(--color-accent) !important; outline-offset: 1px; }
.file-preview .filename { max-width: none !important; }
footer { display: none !important; }
@media (max-width: 800px) {
  .gradio-container { padding: 8px !important; }
  #drawn { height: 360px !important; }
  #draw-parts { grid-template: "asked" "made" "settings" / minmax(0, 1fr); }
  #redraw-parts { grid-template: "given" "asked" "made" "settings" / minmax(0, 1fr); }
}
"""
SCRIPT = """() => {
  // Ctrl+Enter draws in the tab that is open.
  document.addEventListener("keydown", event => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    const button = [...document.querySelectorAll("#draw, #redraw")].find(each => each.offsetParent);
    if (button) { event.preventDefault(); button.click(); }
  });
  // With Tab, Gradio 6.31 would step into the list of a field of choices, and leave it open.
  document.addEventListener("keydown", event => {
    const list = event.key === "Tab" && document.getElementById(event.target.getAttribute("aria-controls"));
    if (list) list.tabIndex = -1;
  }, true);
  document.addEventListener("focusout", event => {
    if (event.target.role !== "combobox") return;
    const escape = new KeyboardEvent("keydown", { key: "Escape", bubbles: true });
    setTimeout(() => event.target.dispatchEvent(escape), 100);
  });
}"""


_VISITORS = 50
"""Gradio keeps half a megabyte for each visitor, and forgets the one who was here longest ago beyond this number."""


def theme() -> Any:
    """Returns the looks of the page."""
    return Default(primary_hue="blue", neutral_hue="slate", font=list(FONTS), font_mono=["ui-monospace", "monospace"])


def page(shared: Shared) -> gr.Blocks:
    """Returns the page. It is made once for all visitors."""
    with gr.Blocks(title="sdjax", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        blocks.state_session_capacity = _VISITORS  # read at the end of this block
        gr.HTML("<h1>sdjax</h1>", elem_id="title")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                drawn, send = draw_tab(shared)
            with gr.Tab("Redraw", id="redraw"):
                editor, chosen = redraw_tab(shared, drawn)
            with gr.Tab("Train", id="train"):
                train_tab(shared)
        send.click(_sent, [chosen, drawn], [editor, tabs], show_progress="hidden", api_visibility="private")
    return blocks


def _sent(chosen: str | None, drawn: Any) -> Any:
    """The chosen picture, or the first, for the editor."""
    picture = chosen or (drawn[0][0] if drawn else None)
    if picture is None:
        raise gr.Error("draw a picture first", print_exception=False)
    return picture, gr.Tabs(selected="redraw")
