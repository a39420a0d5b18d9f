"""The colours of every picture."""

GREEN, RED, INK = "#2e7d32", "#c62828", "#2b2f36"
BEFORE, AFTER = "#b8bec9", "#3a6ea5"  # in every chart of two scorings
# In charts of several groups, told apart by the colour-blind as well: Okabe and Ito, Color Universal Design (2008); its
# blue gives way to AFTER, and its yellow, too pale for lines on white, is left out.
GROUPS = (AFTER, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
