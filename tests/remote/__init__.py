"""Runs at URLs, on real servers of this machine: make remote-test."""
