"""The judge: a classifier of EmojiScenes' objects."""
