"""What a run says about itself: metrics, where they go, the guards that stop it, the dashboard."""
