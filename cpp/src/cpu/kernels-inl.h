// kernels-inl.h -- the body of every instruction-set unit; the unit defines its name and width first
#pragma once
#include "cpu/bag-inl.h"
#include "cpu/dense-inl.h"
#include "cpu/hash-inl.h"
#include "cpu/hashed-inl.h"
#include "cpu/matmul-inl.h"
#include "cpu/sparse-inl.h"
#include "cpu/update-inl.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

#define WIDEHEAD_STRING_(x) #x
#define WIDEHEAD_STRING(x) WIDEHEAD_STRING_(x)
const Kernels kTable = {WIDEHEAD_STRING(WIDEHEAD_ISA_NAME),
                        dense_table(),
                        sparse_table(),
                        update_table(),
                        bag_table(),
                        product_table(),
                        hash_table(),
                        hashed_table()};

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
