"""The likeness judge: does a box show its phrase so that the eye names it at once?"""
