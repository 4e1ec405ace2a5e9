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
.bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; margin-top: 4px; }
.bar div { height: 100%; background: var(--color-accent); transition: width .2s; }
.problem { padding: 8px 12px; border-radius: 8px; border: 1px solid #dc2626; color: #b91c1c; overflow-wrap: anywhere; }
.dark .problem { color: #fca5a5; }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""


def theme() -> Any:
    """Returns the looks of the page."""
    return Default(primary_hue="blue", neutral_hue="slate", font=list(FONTS), font_mono=["ui-monospace", "monospace"])


def page(shared: Shared) -> gr.Blocks:
    """Returns the page. It is made once for all visitors."""
    with gr.Blocks(title="sdjax", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.HTML("<h1>sdjax</h1>", elem_id="title")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                drawn = draw_tab(shared)
                send = gr.Button("Redraw the chosen picture", size="sm", elem_id="send")
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
