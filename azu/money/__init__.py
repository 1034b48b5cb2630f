"""Money: prices, the ledger, the payment chain and the treasury; other rooms use azu.money.books."""
