"""The editions of EmojiScenes by their numbers."""

from __future__ import annotations

from hcma_fast.train.data.emoji_scenes import FIRST, Edition
from hcma_fast.train.data.emoji_scenes2 import SECOND

EDITIONS: dict[int, Edition] = {edition.number: edition for edition in (FIRST, SECOND)}
