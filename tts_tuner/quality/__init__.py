"Rulers: how well a model attends and speaks. Pure numpy."
