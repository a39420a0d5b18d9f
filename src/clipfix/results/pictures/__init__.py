"""What a method draws as it trains, for a person to judge; one file a method, chosen by conf/callbacks."""
