"""Reads the tables of a page back."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The tables of a page: under each caption, rows of cells, a cell being its text and its `data` value."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.tags, self.loaded, self.alts = {}, [], [], []
        self._caption, self._inside = "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.loaded += [values[name] for name in ("src", "href", "srcset", "data", "action") if name in values]
        if tag == "img":
            self.alts.append(values.get("alt"))
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(["", None])
        elif tag == "data" and self._inside and self._inside[-1] in ("td", "th"):
            self._rows[-1][-1][1] = float(values["value"])
        if tag in ("caption", "td", "th"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()
        if tag == "table" and self._caption:
            self.tables[self._caption] = [row for row in self._rows if any(value is not None for _, value in row)]

    def handle_data(self, text):
        if self._inside and self._inside[-1] == "caption":
            self._caption += text
        elif self._inside:
            self._rows[-1][-1][0] += text.strip()  # figure spaces too

    def table(self, title):
        return next(rows for caption, rows in self.tables.items() if caption.startswith(title))


def shown(cell):
    """The number that a person reads in a cell."""
    text = cell[0].replace("−", "-").replace(",", "")
    return None if text == "–" else float(text)
