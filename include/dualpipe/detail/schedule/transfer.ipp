#pragma once

#include "dualpipe/schedule/transfer.hpp"

#include "dualpipe/error.hpp"

namespace dualpipe {

std::string to_string(const Transfer& transfer) {
  const Op producer{detail::producer_of(transfer.payload), transfer.stage, transfer.micro_batch};
  return detail::str(to_string(producer), " from rank ", transfer.from, " to rank ", transfer.to);
}

}  // namespace dualpipe
