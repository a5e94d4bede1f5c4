"""What the analyses share: reading a layer, weighted moments, figures, results, the command line."""
