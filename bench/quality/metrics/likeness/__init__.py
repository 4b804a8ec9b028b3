"""The likeness judge: does a box show its phrase so that a person names it at once?"""
