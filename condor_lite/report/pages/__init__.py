"""The pages for people: a module a page, on what `common` gives them all."""
