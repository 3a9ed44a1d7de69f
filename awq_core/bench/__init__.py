"""How fast models run and what memory they take: what ``awq bench`` measures."""
