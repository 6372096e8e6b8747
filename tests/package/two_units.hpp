#pragma once

#include <string>

/// From the other translation unit, so that both parts are linked: the text of a schedule and the name of the library's
/// error for it.
std::string schedule_text(int num_ranks, int num_micro_batches);
std::string error_text(int num_ranks, int num_micro_batches);
