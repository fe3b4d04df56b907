"""How the page looks: fonts of the visitor's own system, light and dark, one column on a phone."""

from __future__ import annotations

from typing import Any

import gradio as gr

CSS = """
:root { --demo-accent: #0b6e6e; --demo-on-accent: #ffffff; --demo-soft: #475569; }
.dark { --demo-accent: #4fc3b8; --demo-on-accent: #06201e; --demo-soft: #b3c0ce; }
.gradio-container { max-width: 1680px !important; margin: 0 auto !important; }
.gradio-container .fillable { padding: 16px 24px !important; }
.gradio-container main { padding: 0 !important; max-width: none !important; width: 100%; }
footer { display: none !important; }
.html-container { padding: 0 !important; }
#head h1 { font-size: 24px; font-weight: 650; margin: 0; }
#head p { margin: 2px 0 0; color: var(--demo-soft); overflow-wrap: anywhere; }
#head .warn { margin-top: 8px; padding: 8px 12px; border-left: 4px solid #c77700; border-radius: 4px;
  background: color-mix(in srgb, #c77700 12%, transparent); color: var(--body-text-color); }
h2 { font-size: 16px !important; font-weight: 650 !important; margin: 4px 0 0 !important; }
.small { font-size: 14px; line-height: 1.45; color: var(--demo-soft); margin: 0; }
#page { width: 100%; align-items: flex-start; gap: 24px; display: grid;
  grid-template-columns: 280px minmax(0, 1fr) 300px;
  grid-template-areas: "left middle right"; }
#page button.sm { font-size: 14px; min-height: 38px; font-weight: 500; }
#right .column, #right > div { gap: 10px; }
#left { grid-area: left; } #middle { grid-area: middle; } #right { grid-area: right; }
#left, #middle, #right { min-width: 0 !important; gap: 12px; }
.status { display: flex; gap: 10px; align-items: center; flex-wrap: wrap; min-height: 24px; font-size: 15px;
  overflow-wrap: anywhere; }
.status progress { appearance: none; width: 180px; height: 10px; border: 0; border-radius: 5px; overflow: hidden;
  background: var(--border-color-primary); }
.status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.status progress::-webkit-progress-value { background: var(--demo-accent); }
.status progress::-moz-progress-bar { background: var(--demo-accent); }
.status.error { padding: 8px 12px; border-left: 4px solid #c62828; border-radius: 4px;
  background: color-mix(in srgb, #c62828 12%, transparent); }
@media (max-width: 1180px) {
  #page { grid-template-columns: 300px minmax(0, 1fr); grid-template-areas: "left middle" "right middle";
    grid-template-rows: auto 1fr; }
}
@media (max-width: 900px) {
  #page { grid-template-columns: minmax(0, 1fr); grid-template-areas: "left" "middle" "right";
    grid-template-rows: none; }
  .gradio-container .fillable { padding: 12px !important; }
}
"""


def theme() -> Any:
    """Gradio's plainest, with nothing fetched from anywhere."""
    system = ("ui-sans-serif", "system-ui", "sans-serif")
    mono = ("ui-monospace", "Consolas", "monospace")
    base = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=system, font_mono=mono)
    return base.set(
        button_primary_background_fill="#0b6e6e",
        button_primary_background_fill_dark="#4fc3b8",
        button_primary_background_fill_hover="#0a5c5c",
        button_primary_background_fill_hover_dark="#7ad7cd",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#06201e",
    )
