"""A function as data: what it computes, apart from python."""
