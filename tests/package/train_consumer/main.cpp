// Ranks as threads.
#include "dualpipe/comm/local.hpp"
#include "train.hpp"

int main() { dualpipe::run_ranks(2, train); }
