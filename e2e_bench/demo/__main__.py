"""``python -m e2e_bench.demo``."""

from e2e_bench.demo.run_demo import main

if __name__ == "__main__":
    main()
