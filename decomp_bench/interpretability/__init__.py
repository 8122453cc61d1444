"""How well contexts tell when components are active: one harvest, proxies without a judge, a judge's scores; and the MLP's Jacobian."""
