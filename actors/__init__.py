"""OneComp on Ray: thin actor shells around the library's plain classes."""
