#pragma once

/// Version of these headers; the same as in CMake's project() and in find_package(dualpipe).
#define DUALPIPE_VERSION_MAJOR 0
#define DUALPIPE_VERSION_MINOR 1
#define DUALPIPE_VERSION_PATCH 0
#define DUALPIPE_VERSION "0.1.0"
