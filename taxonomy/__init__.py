"""What is known about efficiency methods: vocabulary, cards, catalogue, queries, site. Never imports torch."""
