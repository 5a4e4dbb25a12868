"From a trained model to speech."
