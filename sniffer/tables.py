"""Datasets of tables under the name that configurations and saved runs give them; they live in sniffer/dataset."""

from sniffer.dataset.hub import Hub
from sniffer.dataset.tables import Csv, Json, JsonLines, Parquet, Table

__all__ = ["Csv", "Hub", "Json", "JsonLines", "Parquet", "Table"]
