"""The local page of `label`: its server, its views, and what the browser gets (`static`)."""
