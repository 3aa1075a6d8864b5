# SPDX-License-Identifier: Apache-2.0
"""The page's look: a Gradio theme of system fonts, and our own style sheet and script beside this file."""

from __future__ import annotations

from pathlib import Path

from gradio.themes import Base
from gradio.themes.utils import colors, sizes

HERE = Path(__file__).parent
FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Base:
    """Calm: warm greys, one teal, thin lines and no shadows."""
    look = Base(
        primary_hue=colors.teal,
        secondary_hue=colors.teal,
        neutral_hue=colors.stone,
        text_size=sizes.text_md,
        spacing_size=sizes.spacing_md,
        radius_size=sizes.radius_md,
        font=FONTS,
        font_mono=MONO,
    )
    look.set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#141312",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1d1b1a",
        background_fill_secondary="#f5f4f1",
        background_fill_secondary_dark="#191817",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1d1b1a",
        block_border_color="#e4e1dc",
        block_border_color_dark="#34302d",
        border_color_primary="#d8d4ce",
        border_color_primary_dark="#3d3935",
        input_background_fill="#ffffff",
        input_background_fill_dark="#141312",
        input_border_color="#b8b2aa",
        input_border_color_dark="#57524d",
        input_border_color_focus="*primary_700",
        input_border_color_focus_dark="*primary_400",
        input_border_width="1px",
        input_shadow="none",
        input_shadow_focus="none",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0",
        block_label_text_color="#57534e",
        block_label_text_color_dark="#b8b2aa",
        block_title_text_color="#44403c",
        block_title_text_color_dark="#d6d3d1",
        block_title_text_weight="550",
        body_text_color="#1c1917",
        body_text_color_dark="#f1efec",
        body_text_color_subdued="#57534e",
        body_text_color_subdued_dark="#b8b2aa",
        input_placeholder_color="#78716c",
        input_placeholder_color_dark="#8f8880",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#14958a",
        button_primary_background_fill_hover_dark="#0f766e",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#06110f",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#f0eeea",
        button_secondary_background_fill_dark="#26231f",
        button_secondary_background_fill_hover_dark="#322e29",
        button_secondary_border_color="#d8d4ce",
        button_secondary_border_color_dark="#3d3935",
        button_secondary_text_color="#292524",
        button_secondary_text_color_dark="#e7e5e4",
        button_large_text_weight="550",
    )
    return look


def style() -> str:
    return (HERE / "page.css").read_text("utf-8")


def head() -> str:
    """For the document's head: our script."""
    return f"<script>\n{(HERE / 'page.js').read_text('utf-8')}</script>"
