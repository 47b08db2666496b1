"""Complete programs that use Caddie from outside."""
