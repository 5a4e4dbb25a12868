"Corpora: reading, checking, naming by content, features, batches, the demo corpus."
